"""Average recall of class-agnostic proposals (Hosang et al., "What makes for effective detection proposals?", 2015).

Built as COCO measures it: greedy matching in the order of the scores, recall averaged over IoU 0.5 to 0.95, at a given
number of proposals per image, classes ignored. Equal to pycocotools with ``useCats = 0`` over all areas: crowds do not
count, and are there to excuse proposals alone.

Letters: G objects, C candidates, T IoU thresholds, L limits, P points of the curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detseg.metrics.base import Array, DictMetric, Figures
from detseg.metrics.matching import IOU_THRESHOLDS, match
from detseg.metrics.overlaps import box_pairs
from detseg.metrics.scene import check_batch
from detseg.structures import Detections, Target

POINTS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)
"""Numbers of proposals at which the curve is counted beside the limits, as far as those go."""


class ProposalRecall(DictMetric):
    """Average recall of proposals at several limits; the same on any number of processes.

    Images are matched in ``update``, so only counts are kept. ``compute`` gives one ``ar_<limit>`` per limit, float64,
    and ``ar_count``, the objects that are not crowds. ``recall_50_<limit>`` is the recall at IoU 0.5 alone: AP at IoU
    0.5 can be little more for a detector that must choose among these proposals and moves them little. For curves,
    ``recall`` ``(P, T)`` at IoU 0.5, 0.55, ..., 0.95 after ``recall_points`` ``(P, 1)`` proposals. NaN where there
    are no objects.

    Args:
        limits: proposals per image that are looked at, ascending.
    """

    matched: Tensor
    objects: Tensor

    def __init__(self, *, limits: Sequence[int] = (100, 300, 1000, 2000)) -> None:
        super().__init__()
        if not limits or sorted(set(limits)) != list(limits) or limits[0] < 1:
            raise ValueError(f"limits is {tuple(limits)}; give ascending numbers from 1, as (100, 300, 1000)")
        self.limits = tuple(limits)
        self.points = tuple(sorted({*limits, *(point for point in POINTS if point <= limits[-1])}))
        shape = (len(self.points), len(IOU_THRESHOLDS))
        self.add_state("matched", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("objects", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, proposals: list[Detections], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            proposals: one per image, in the pixels of its target; labels are not looked at.
            targets: one per image.

        Raises:
            ValueError: a box or score is not finite; the message names the image.
        """
        check_batch(proposals, targets, None)
        for found, target in zip(proposals, targets, strict=True):
            crowd = target.iscrowd.cpu().numpy()
            self.objects += int((~crowd).sum())
            self.matched += torch.from_numpy(
                matched_objects(
                    found.boxes.detach().cpu().double().numpy(),
                    found.scores.detach().cpu().double().numpy(),
                    target.boxes.cpu().double().numpy(),
                    crowd,
                    self.points,
                )
            ).to(self.device)

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        recall = self.matched.double() / self.objects  # (P, T); 0 / 0 is NaN: n/a
        rows = {limit: recall[self.points.index(limit)] for limit in self.limits}
        return self.figures(
            {f"ar_{limit}": row.mean() for limit, row in rows.items()}
            | {f"recall_50_{limit}": row[0] for limit, row in rows.items()}
            | {"ar_count": self.objects, "recall": recall, "recall_points": torch.tensor(self.points)[:, None]}
        )


def matched_objects(boxes: Array, scores: Array, truth_boxes: Array, crowd: Array, limits: Sequence[int]) -> Array:
    """Return how many objects of one image its best proposals find.

    Args:
        boxes: ``(N, 4)`` float64 xyxy.
        scores: ``(N,)`` float64.
        truth_boxes: ``(G, 4)`` float64.
        crowd: ``(G,)`` bool.
        limits: ``L`` numbers of proposals, ascending.

    Returns:
        ``(L, T)`` int64.
    """
    boxes = boxes[np.argsort(-scores, kind="stable")[: limits[-1]]]
    one, group = np.zeros(len(boxes), dtype=np.int64), np.zeros(len(truth_boxes), dtype=np.int64)
    pairs = box_pairs(boxes, one, truth_boxes, group, crowd, minimum=IOU_THRESHOLDS[0])
    matches = match(pairs, group, crowd[:, None], crowd, IOU_THRESHOLDS)
    found = matches.counted[:, 0]  # (C, T)
    return np.stack([found[matches.candidate < limit].sum(axis=0) for limit in limits])
