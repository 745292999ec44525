"""COCO average precision and recall for boxes and masks, equal to pycocotools (Lin et al., "Microsoft COCO", 2014).

Built: the twelve figures of ``COCOeval.summarize``, figures per class, and the numbers of objects behind them. Differs:
- a figure without objects is NaN, with a count of 0; pycocotools says -1;
- masks' detections are sorted into area ranges by their masks. ``COCO.loadRes`` uses the box where a result has both.

Letters: N detections, G objects, C candidates (detections that may match), K classes, A area ranges, T IoU thresholds,
R recall levels, L detection limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detseg.metrics.base import Array, Figures, mean_or_nan
from detseg.metrics.curves import RECALL_LEVELS, precision_at_recalls
from detseg.metrics.matching import AREA_RANGES, IOU_THRESHOLDS, Matches, match, outside, running_number
from detseg.metrics.overlaps import Pairs, box_pairs, mask_iou, pack_masks, packed_areas
from detseg.metrics.scene import Found, SceneMetric, Truth
from detseg.structures import Detections, Target

AREAS = list(AREA_RANGES)


@dataclass(frozen=True)
class CocoTables:
    """Everything the figures are read from; NaN where a class has no object in an area range.

    Attributes:
        precision: ``(K, A, R, T)``, detections limited to the largest limit.
        recall: ``(K, A, L, T)``.
        count: ``(K, A)`` int64, objects that count.
    """

    precision: Array
    recall: Array
    count: Array


class CocoAP(SceneMetric):
    """COCO AP and AR over an epoch; exact, on any number of processes.

    ``compute`` gives float64 scalars ``map, map_50, map_75, map_small, map_medium, map_large``, ``mar_1, mar_10,
    mar_100`` (one per limit), ``mar_small, mar_medium, mar_large``; tensors ``map_per_class, map_50_per_class,
    mar_100_per_class`` ``(K,)``; the curves ``precision_50`` and ``precision_75``, ``(K, 101)`` interpolated precision
    at recall 0, 0.01, ..., 1 and IoU 0.5 and 0.75; and the numbers of objects behind them, ``count, count_small,
    count_medium, count_large`` and ``count_per_class``. Figures that rest on no object are NaN.

    Args:
        iou_type: ``"bbox"`` or ``"segm"``. For masks, IoUs are taken in ``update`` and no mask is kept.
        class_names: names by label; labels must then lie below their number.
        num_classes: the number of classes where there are no names. With neither, labels may be any.
        max_detections: limits per image and class, ascending; AP uses the last.

    Raises:
        ValueError: NaN, infinity or a label outside the range (names the image); masks that are missing or differ in
            size; an image id that came twice (at ``compute``).
    """

    def __init__(
        self,
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        max_detections: Sequence[int] = (1, 10, 100),
    ) -> None:
        super().__init__(num_classes=num_classes, class_names=class_names)
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f"iou_type is {iou_type!r}; it must be 'bbox' or 'segm'")
        if not max_detections or sorted(set(max_detections)) != list(max_detections) or max_detections[0] < 1:
            raise ValueError(
                f"max_detections is {tuple(max_detections)}; give ascending numbers from 1, as (1, 10, 100)"
            )
        self.iou_type = iou_type
        self.max_detections = tuple(max_detections)
        if iou_type == "segm":
            self.add_rows("overlaps", 3)  # detection and object, counted within the image, and IoU
            self.add_rows("overlap_images", 1, torch.int64)  # the image id of each

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            detections: one per image, in the pixels of its target.
            targets: one per image, each with its own ``image_id``.
        """
        if self.iou_type == "bbox" or len(detections) != len(targets):
            self.keep_scene(detections, targets, areas=None)
            return
        overlaps = [mask_overlaps(found, target) for found, target in zip(detections, targets, strict=True)]
        self.keep_scene(detections, targets, areas=[area for area, _ in overlaps])
        for target, (_, block) in zip(targets, overlaps, strict=True):
            self.keep("overlaps", block)
            self.keep("overlap_images", torch.full((len(block), 1), target.image_id))

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        found, truth, image_ids = self.scene()
        pairs = None
        if self.iou_type == "segm":
            pairs = _global_pairs(self.rows("overlaps"), self.rows("overlap_images")[:, 0], found, truth, image_ids)
        tables = coco_tables(
            found,
            truth,
            num_classes=self.classes(found, truth),
            limits=self.max_detections,
            pairs=pairs,
        )
        return self.figures(coco_figures(tables, self.max_detections))


def mask_overlaps(found: Detections, target: Target) -> tuple[Tensor, Tensor]:
    """Return what is kept of one image's masks.

    Returns:
        ``(N,)`` float64 areas of the detections, and ``(P, 3)`` float64 rows (detection, object, IoU) of the
        pairs of one class that overlap enough to match.

    Raises:
        ValueError: masks are missing, or their sizes differ.
    """
    where = f"image {target.image_id}" + (f" ({target.file})" if target.file else "")
    for what, owner in (("detections", found), ("objects", target)):
        if owner.masks is None and len(owner):
            raise ValueError(f"{where}: its {len(owner)} {what} have no masks; iou_type='segm' compares masks")
    if found.masks is None or len(found) == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros((0, 3), dtype=torch.float64)
    packed = pack_masks(found.masks)
    area = torch.from_numpy(packed_areas(packed)).double()
    if target.masks is None or len(target) == 0:
        return area, torch.zeros((0, 3), dtype=torch.float64)
    if found.masks.shape[1:] != target.masks.shape[1:]:
        sizes = f"{tuple(found.masks.shape[1:])} and {tuple(target.masks.shape[1:])}"
        raise ValueError(f"{where}: masks of detections and objects are {sizes}; resize the detections to the image")
    same = (found.labels.cpu()[:, None] == target.labels.cpu()).numpy()
    detection, truth = np.nonzero(same)
    iou = mask_iou(packed, pack_masks(target.masks), detection, truth, target.iscrowd.cpu().numpy())
    near = iou >= IOU_THRESHOLDS[0]
    rows = np.stack([detection, truth, iou], axis=1)
    return area, torch.from_numpy(rows[near])


def _global_pairs(overlaps: Array, images: Array, found: Found, truth: Truth, image_ids: Array) -> Pairs:
    """Turn places within an image into rows of the whole.

    Args:
        overlaps: ``(P, 3)``, see ``mask_overlaps``.
        images: ``(P,)`` image ids.
        found: all detections, sorted by image.
        truth: all objects, sorted by image.
        image_ids: ``(I,)`` ascending.
    """
    place = np.searchsorted(image_ids, images)
    detection = np.searchsorted(found.image, place) + overlaps[:, 0].astype(np.int64)
    return Pairs(detection, np.searchsorted(truth.image, place) + overlaps[:, 1].astype(np.int64), overlaps[:, 2])


def coco_tables(
    found: Found,
    truth: Truth,
    *,
    num_classes: int,
    limits: Sequence[int],
    pairs: Pairs | None = None,
) -> CocoTables:
    """Match all detections and count along the scores.

    Args:
        found: detections, sorted by image.
        truth: objects, sorted by image.
        num_classes: K; labels lie below it.
        limits: ascending limits of detections per image and class.
        pairs: detections and objects of one class that overlap by 0.5 or more; ``None``: those of the boxes.
    """
    # By class, best first; stable, so that ties stay in the order of images, as in pycocotools.
    order = np.lexsort((-found.score, found.label))
    found = found.take(order)
    group, truth_group = found.image * num_classes + found.label, truth.image * num_classes + truth.label
    rank = running_number(group)
    keep = rank < limits[-1]
    if pairs is None:
        found, group, rank = found.take(keep), group[keep], rank[keep]
        pairs = box_pairs(found.box, group, truth.box, truth_group, truth.crowd, minimum=IOU_THRESHOLDS[0])
    else:
        row = np.full(len(order), -1)
        row[order[keep]] = np.arange(int(keep.sum()))
        found, rank = found.take(keep), rank[keep]
        kept = row[pairs.detection] >= 0
        pairs = Pairs(row[pairs.detection[kept]], pairs.truth[kept], pairs.iou[kept])
    ranges = list(AREA_RANGES.values())
    ignored = truth.crowd[:, None] | outside(truth.area, ranges)  # (G, A)
    matches = match(pairs, truth_group, ignored, truth.crowd, IOU_THRESHOLDS)
    return _count(found, rank, matches, outside(found.area, ranges), _objects(truth, ignored, num_classes), limits)


def _objects(truth: Truth, ignored: Array, num_classes: int) -> Array:
    """Return ``(K, A)`` int64: objects that count."""
    columns = [np.bincount(truth.label[~ignored[:, a]], minlength=num_classes) for a in range(ignored.shape[1])]
    return np.stack(columns, axis=1)


def _count(
    found: Found, rank: Array, matches: Matches, beyond: Array, count: Array, limits: Sequence[int]
) -> CocoTables:
    """Accumulate true and false positives, class by class and area range by area range.

    Args:
        found: detections sorted by class, then score.
        rank: ``(N,)`` place of the detection in its image and class.
        matches: candidates in the same order.
        beyond: ``(N, A)`` bool, detections outside an area range: ignored where they match nothing.
        count: ``(K, A)`` objects that count.
        limits: see ``coco_tables``.
    """
    classes, areas = count.shape
    thresholds = matches.counted.shape[2]
    precision = np.full((classes, areas, len(RECALL_LEVELS), thresholds), np.nan)
    recall = np.full((classes, areas, len(limits), thresholds), np.nan)
    counted = matches.counted  # (C, A, T)
    start = np.searchsorted(found.label, np.arange(classes + 1))
    candidate_start = np.searchsorted(matches.candidate, start)
    for k, a in zip(*np.nonzero(count), strict=True):
        inside = ~beyond[start[k] : start[k + 1], a]  # (n,)
        mine = slice(candidate_start[k], candidate_start[k + 1])
        at = matches.candidate[mine] - start[k]  # (c,)
        hit, spared = counted[mine, a], matches.ignored[mine, a]  # (c, T)
        true = hit.cumsum(axis=0)
        # As if no candidate had matched, then put right for those that did.
        base = inside.cumsum()[at]  # (c,)
        change = np.where(hit | spared, hit.astype(np.int64) - inside[at, None], 0)
        false = base[:, None] + change.cumsum(axis=0) - true
        precision[k, a] = precision_at_recalls(true, false, int(count[k, a]))
        ranks = rank[matches.candidate[mine]]
        for place, limit in enumerate(limits):
            recall[k, a, place] = hit[ranks < limit].sum(axis=0) / count[k, a]
    return CocoTables(precision, recall, count)


def coco_figures(tables: CocoTables, limits: Sequence[int]) -> dict[str, Any]:
    """Return the figures by torchmetrics' names; see ``CocoAP``."""
    precision, recall, count = tables.precision, tables.recall, tables.count
    values: dict[str, Any] = {
        "map": mean_or_nan(precision[:, 0]),
        "map_50": mean_or_nan(precision[:, 0, :, 0]),
        "map_75": mean_or_nan(precision[:, 0, :, 5]),
    }
    values |= {f"map_{area}": mean_or_nan(precision[:, a]) for a, area in enumerate(AREAS) if a}
    values |= {f"mar_{limit}": mean_or_nan(recall[:, 0, place]) for place, limit in enumerate(limits)}
    values |= {f"mar_{area}": mean_or_nan(recall[:, a, -1]) for a, area in enumerate(AREAS) if a}
    values |= {
        "map_per_class": precision[:, 0].mean(axis=(1, 2)),
        "map_50_per_class": precision[:, 0, :, 0].mean(axis=1),
    }
    values |= {"precision_50": precision[:, 0, :, 0], "precision_75": precision[:, 0, :, 5]}
    values |= {f"mar_{limits[-1]}_per_class": recall[:, 0, -1].mean(axis=1), "count": int(count[:, 0].sum())}
    values |= {f"count_{area}": int(count[:, a].sum()) for a, area in enumerate(AREAS) if a}
    return values | {"count_per_class": count[:, 0]}
