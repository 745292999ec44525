"""How well masks fit where the boxes already do: the mean mask IoU of detections whose box found an object.

It separates the mask head's work from the detector's: a low mask AP beside a high mask quality means that objects are
missed, not that they are badly cut out. No paper's figure; it is COCO's matching of boxes at IoU 0.5, then the mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from detseg.metrics.base import Array, Figures, RowMetric
from detseg.metrics.matching import match
from detseg.metrics.overlaps import box_pairs, mask_iou, pack_masks
from detseg.metrics.scene import check_batch
from detseg.structures import Detections, Target


class MaskQuality(RowMetric):
    """Mean mask IoU of detections matched by box; the same on any number of processes.

    ``compute`` gives ``mask_quality``, float64, NaN where nothing matched, and ``mask_quality_count``, the matched
    detections. Crowds are not matched.

    Args:
        iou_threshold: least IoU of the boxes.
    """

    def __init__(self, *, iou_threshold: float = 0.5) -> None:
        super().__init__()
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in (0, 1]")
        self.iou_threshold = iou_threshold
        self.add_rows("ious", 1)

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            detections: one per image, with masks, in the pixels of its target.
            targets: one per image, with masks.

        Raises:
            ValueError: masks are missing or differ in size, or a box or score is not finite; names the image.
        """
        check_batch(detections, targets, None)
        for found, target in zip(detections, targets, strict=True):
            if len(found) and len(target):
                self.keep("ious", torch.from_numpy(matched_mask_ious(found, target, self.iou_threshold))[:, None])

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        ious = self.rows("ious")[:, 0]
        # fsum rounds once, so the order in which ranks arrive cannot show
        quality = math.fsum(ious) / len(ious) if len(ious) else math.nan
        return self.figures({"mask_quality": quality, "mask_quality_count": len(ious)})


def matched_mask_ious(found: Detections, target: Target, iou_threshold: float = 0.5) -> Array:
    """Return the mask IoU ``(n,)`` float64 of each detection of one image whose box is matched to an object.

    Raises:
        ValueError: masks are missing or differ in size; names the image.
    """
    if found.masks is None or target.masks is None or found.masks.shape[1:] != target.masks.shape[1:]:
        sizes = [None if masks is None else tuple(masks.shape[1:]) for masks in (found.masks, target.masks)]
        raise ValueError(
            f"image {target.image_id}: masks of detections and objects are {sizes[0]} and {sizes[1]}; "
            "both are needed, at one size"
        )
    found, target = found[found.scores.argsort(descending=True, stable=True)], target.trainable()
    crowd = np.zeros(len(target), dtype=bool)
    group = target.labels.cpu().numpy()
    pairs = box_pairs(
        found.boxes.detach().cpu().double().numpy(),
        found.labels.cpu().numpy(),
        target.boxes.cpu().double().numpy(),
        group,
        crowd,
        minimum=iou_threshold,
    )
    matches = match(pairs, group, crowd[:, None], crowd, np.array([iou_threshold]))
    partner = matches.truth[:, 0, 0]
    detection, truth = matches.candidate[partner >= 0], partner[partner >= 0]
    assert found.masks is not None and target.masks is not None  # checked above
    masks, others = (
        pack_masks(owner[torch.from_numpy(rows).to(owner.device, torch.int64)])
        for owner, rows in ((found.masks, detection), (target.masks, truth))
    )
    at = np.arange(len(detection))
    return mask_iou(masks, others, at, at, crowd[truth])
