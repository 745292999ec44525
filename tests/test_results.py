"""Predictions as files, read back by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detseg.metrics import CocoAP
from detseg.results import result_rows, write_map
from detseg.structures import Detections, SemanticMap, Target

IDS = [3, 17]  # the data set's own, with a gap


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + 8 + torch.rand(count, 2, generator=generator) * 30], dim=1)


def scene(image_id: int) -> tuple[Target, Detections]:
    """Return random objects, and detections of which the first ones lie close to them."""
    generator = torch.Generator().manual_seed(image_id)
    boxes, labels = random_boxes(4, generator), torch.randint(0, 2, (4,), generator=generator)
    near = boxes + torch.randn(4, 4, generator=generator) * 2
    found = torch.cat([near, random_boxes(5, generator)])
    kinds = torch.cat([labels, torch.randint(0, 2, (5,), generator=generator)])
    order = torch.rand(9, generator=generator).sort(descending=True)
    return Target(boxes, labels, image_id=image_id, size=(100, 100)), Detections(found, order.values, kinds)


def test_pycocotools_reads_the_rows_and_finds_the_same_ap():
    """Through JSON and back: nothing is lost to rounding."""
    scenes = [scene(image_id) for image_id in range(40, 52)]
    metric = CocoAP(class_names=["a", "b"])
    metric.update([found for _, found in scenes], [target for target, _ in scenes])
    truth = {
        "images": [{"id": target.image_id} for target, _ in scenes],
        "categories": [{"id": number} for number in IDS],
        "annotations": [
            {
                "id": 1 + 10 * target.image_id + row,
                "image_id": target.image_id,
                "category_id": IDS[int(target.labels[row])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(target.area[row]),
                "iscrowd": 0,
            }
            for target, _ in scenes
            for row, (x1, y1, x2, y2) in enumerate(target.boxes.tolist())
        ],
    }
    rows = [row for target, found in scenes for row in result_rows(found, category_ids=IDS, image_id=target.image_id)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        oracle = COCOeval(coco, coco.loadRes(json.loads(json.dumps(rows))), "bbox")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    figures = metric.compute()
    assert 0.1 < float(figures["map"]) < 0.9
    assert float(figures["map"]) == pytest.approx(oracle.stats[0], abs=1e-6)
    assert float(figures["mar_100"]) == pytest.approx(oracle.stats[8], abs=1e-6)


def test_masks_become_run_lengths_that_decode_to_themselves():
    masks = torch.rand(3, 7, 11) > 0.5
    found = Detections(torch.tensor([[0.0, 0, 7, 7]] * 3), torch.ones(3), torch.tensor([0, 1, 1]), masks)
    rows = json.loads(json.dumps(result_rows(found, category_ids=IDS, class_names=["a", "b"])))
    assert [row["category_id"] for row in rows] == [3, 17, 17] and [row["category"] for row in rows] == ["a", "b", "b"]
    assert rows[0]["segmentation"]["size"] == [7, 11] and "image_id" not in rows[0]
    for row, mask in zip(rows, masks, strict=True):
        decoded = coco_mask.decode({**row["segmentation"], "counts": row["segmentation"]["counts"].encode()})
        np.testing.assert_array_equal(decoded.astype(bool), mask.numpy())


def test_nothing_found_is_no_row():
    assert result_rows(Detections.empty(mask_size=(4, 4)), category_ids=IDS, image_id=1) == []


@pytest.mark.parametrize("top, mode", [(200, "L"), (300, "I;16")])
def test_maps_keep_every_label(top: int, mode: str, tmp_path: Path):
    labels = torch.arange(12).reshape(3, 4)
    labels[0, 0] = top
    path = write_map(SemanticMap(labels), tmp_path / "maps" / "a.png")
    with Image.open(path) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), labels.numpy())
