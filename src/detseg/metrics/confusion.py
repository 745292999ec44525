"""Which class is taken for which: a confusion matrix of detections, with a row and a column for the background.

Detections choose as in COCO's matching (best score first, the free object of highest IoU), but among the objects of all
classes, and at one IoU and above one score. What differs from the matrix of YOLO tools: crowds are neither missed nor
found, and a detection in a crowd is left out.

Letters: K classes; rows of the matrix are truth, columns are predictions, the last of each is the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detseg.metrics.base import Array, DictMetric, Figures
from detseg.metrics.matching import match
from detseg.metrics.overlaps import box_pairs
from detseg.metrics.scene import check_batch
from detseg.structures import Detections, Target


class BoxConfusion(DictMetric):
    """Counts of objects by class and by what was found there; the same on any number of processes.

    ``compute`` gives ``confusion``, ``(K + 1, K + 1)`` int64. Cell ``[i, K]`` holds objects of class i that nothing
    found, ``[K, j]`` detections of class j where no object is.

    Args:
        class_names: names by label; their number is K.
        iou: least overlap of a detection with its object, in (0, 1].
        min_score: detections below this score are left out, as in the pictures.
    """

    confusion: Tensor

    def __init__(self, *, class_names: Sequence[str], iou: float = 0.5, min_score: float = 0.3) -> None:
        super().__init__()
        if not 0 < iou <= 1:
            raise ValueError(f"BoxConfusion: iou is {iou}; it must be above 0 and at most 1, as 0.5")
        self.class_names, self.iou, self.min_score = list(class_names), iou, min_score
        side = len(self.class_names) + 1
        self.add_state("confusion", torch.zeros((side, side), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            detections: one per image, in the pixels of its target.
            targets: one per image.

        Raises:
            ValueError: a label is outside 0..K-1 or a number is not finite; the message names the image.
        """
        check_batch(detections, targets, len(self.class_names))
        for found, target in zip(detections, targets, strict=True):
            counted = found[found.scores >= self.min_score]
            self.confusion += torch.from_numpy(self._count(counted, target)).to(self.confusion.device)

    def compute(self) -> Figures:
        """Return the matrix under ``confusion``."""
        return self.figures({"confusion": self.confusion})

    def _count(self, found: Detections, target: Target) -> Array:
        order = found.scores.argsort(descending=True, stable=True)
        boxes, labels = (value[order].cpu().numpy() for value in (found.boxes.double(), found.labels))
        truth, crowd = target.labels.cpu().numpy(), target.iscrowd.cpu().numpy()
        partner = best_partners(boxes, target.boxes.double().cpu().numpy(), crowd, self.iou)  # (N,)
        background = len(self.class_names)
        matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
        counts = ~np.append(crowd, False)[partner]  # partner -1, the background, reads the last one
        np.add.at(matrix, (np.append(truth, background)[partner[counts]], labels[counts]), 1)
        missed = np.setdiff1d(np.flatnonzero(~crowd), partner)
        np.add.at(matrix, (truth[missed], background), 1)
        return matrix


def best_partners(boxes: Array, truth: Array, crowd: Array, iou: float) -> Array:
    """Match the detections of one image to its objects, whatever their classes.

    Args:
        boxes: ``(N, 4)`` float64 xyxy, best score first.
        truth: ``(G, 4)`` float64 xyxy.
        crowd: ``(G,)`` bool; may be matched again and again, but only by what fits no other object.
        iou: least overlap.

    Returns:
        ``(N,)`` int64: the object of each detection, -1 where there is none.
    """
    group, truth_group = np.zeros(len(boxes), dtype=np.int64), np.zeros(len(truth), dtype=np.int64)
    pairs = box_pairs(boxes, group, truth, truth_group, crowd, minimum=iou)
    matches = match(pairs, truth_group, crowd[:, None], crowd, np.array([iou]))
    partner = np.full(len(boxes), -1, dtype=np.int64)
    partner[matches.candidate] = matches.truth[:, 0, 0]
    return partner
