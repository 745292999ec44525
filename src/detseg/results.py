"""Predictions as files: rows of COCO's result format, and index PNGs for semantic maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detseg.structures import Detections, SemanticMap


def result_rows(
    found: Detections, *, category_ids: Sequence[int], class_names: Sequence[str] = (), image_id: int | None = None
) -> list[dict[str, Any]]:
    """Return one row per detection, best first, as COCO's result format has them.

    Args:
        found: in the photo's own pixels.
        category_ids: the data set's own ids by label.
        class_names: by label; given, every row also has its ``category``.
        image_id: the data set's own id; given, every row has it.

    Returns:
        Rows with ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score`` and, where there are masks,
        ``segmentation`` (compressed run lengths: ``size`` and ``counts``).
    """
    first = {} if image_id is None else {"image_id": int(image_id)}
    rows: list[dict[str, Any]] = []
    masks = [None] * len(found) if found.masks is None else list(found.masks.cpu().numpy())
    values = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), masks, strict=True)
    for (x1, y1, x2, y2), score, label, mask in values:
        row = {
            **first,
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        if class_names:
            row["category"] = class_names[label]
        if mask is not None:
            row["segmentation"] = _run_lengths(mask)
        rows.append(row)
    return rows


def write_map(semantic: SemanticMap, path: Path) -> str:
    """Write a semantic map as a PNG whose pixels are labels (8 bit; 16 bit from 256 classes on); return its path."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    labels = semantic.labels.cpu().numpy()
    kind = np.uint8 if not labels.size or labels.max() <= 255 else np.uint16
    Image.fromarray(labels.astype(kind)).save(path)
    return str(path)


def _run_lengths(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return COCO's compressed run lengths of a bool mask (H, W), with text that JSON can hold."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}
