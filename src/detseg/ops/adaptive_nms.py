"""Greedy NMS whose threshold is each box's own: by its size, or by how crowded its place is.

A kept box M drops those of its label whose IoU with it exceeds N_M. By density this is
`"Adaptive NMS: Refining Pedestrian Detection in a Crowd" <https://arxiv.org/abs/1904.03629>`_, N_M = max(N_t, d_M),
where the density d_M is the largest IoU of M's object with another object. Differs: the paper's network learns to
predict d_M; here it is estimated from the boxes of the image, so that any detector can use it without training. Two
confident boxes of one object that overlap less than ``duplicate_iou`` are then taken for two objects, which a learnt
density need not do, and objects that overlap more stay one. The other rule, by size, has no paper of its own: a shift
of a few pixels takes more of the IoU of a small box, so its duplicates overlap it less and ask for a lower threshold.

Letters: N boxes, P peaks (the best box of each heap), Q of them objects, K boxes kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from detseg.ops.boxes import box_area
from detseg.ops.nms import check_share
from detseg.ops.suppress import Floats, Ints, gather, on_host, pairs, suppress

_PAIRS = 1 << 19  # boxes times objects that are compared at a time; bounds memory


def greedy_nms(boxes: Tensor, scores: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Return the rows kept ``(K,)`` int64, best first, of equal scores the earlier first.

    Args:
        boxes: ``(N, 4)`` xyxy, finite, in host memory.
        scores: ``(N,)``, finite, likewise.
        labels: ``(N,)`` int64, likewise.
        thresholds: ``(N,)`` in [0, 1]: the IoU above which a kept box drops others of its label.
    """
    order = scores.argsort(descending=True, stable=True)  # (N,)
    rank = torch.empty(len(scores), dtype=torch.float64)  # (N,): any score goes, negative ones too
    rank[order] = torch.arange(len(scores), 0, -1, dtype=torch.float64)
    limits = thresholds.double().numpy()  # (N,)

    def factor(row: Ints, iou: Floats) -> Floats:
        return (iou <= limits[row]).astype(np.float64)  # (P,)

    return suppress(boxes, rank, labels, factor, floor=1.0)[0]


def size_thresholds(
    boxes: Tensor, threshold: float, offsets: tuple[float, float], sides: tuple[float, float]
) -> Tensor:
    """Return the threshold of every box ``(N,)`` float64.

    ``threshold + offsets[0]`` for boxes with a side up to ``sides[0]``, ``threshold + offsets[1]`` from ``sides[1]``,
    and between them along a line in the logarithm of the side.

    Args:
        boxes: ``(N, 4)`` xyxy pixels.
        threshold: an IoU.
        offsets: of small and of large boxes.
        sides: pixels, of small and of large boxes: roots of areas.
    """
    low, high = (math.log(side) for side in sides)
    side: Tensor = box_area(boxes.double()).clamp(min=0).sqrt()  # (N,)
    share = ((side.log() - low) / (high - low)).clamp(0.0, 1.0)  # (N,)
    return threshold + offsets[0] + (offsets[1] - offsets[0]) * share  # (N,)


def crowd_density(boxes: Tensor, labels: Tensor, objects: Tensor, duplicate_iou: float) -> Tensor:
    """Return the largest IoU of each box with an object of its label that is not its own, ``(N,)`` float64.

    Args:
        boxes: ``(N, 4)`` xyxy, finite, in host memory.
        labels: ``(N,)`` int64, likewise.
        objects: ``(Q,)`` int64, rows of the boxes that stand for an object.
        duplicate_iou: above this IoU a box is of that object itself.
    """
    every = gather(boxes, torch.zeros(len(boxes)), labels)
    some = every[objects.numpy()]
    density = np.zeros(len(boxes))
    for rows in np.array_split(every.rows, 1 + len(boxes) * len(objects) // _PAIRS):  # (r,)
        box, row, iou = pairs(every[rows], some)  # (P,) each
        other = (iou <= duplicate_iou) & (rows[box] != some.rows[row])  # (P,)
        np.maximum.at(density, rows[box[other]], iou[other])
    return torch.from_numpy(density)  # (N,)


class SizeAdaptiveNMS:
    """Greedy NMS per label with a threshold that goes with the size of the better box.

    Computed on the host: for tensors on a GPU it waits for them.

    Args:
        threshold: what the offsets are added to: a box is dropped where its IoU with a better one M of its label
            exceeds N_M.
        small_offset: N_M - threshold of boxes up to ``small_side``.
        large_offset: N_M - threshold of boxes from ``large_side``; between the two sides N_M is linear in log(side).
        small_side: pixels, root of the area; the default is where COCO's small objects end.
        large_side: likewise; where COCO's large objects begin.
        class_agnostic: boxes of different labels suppress each other too.

    Raises:
        ValueError: a threshold lies outside [0, 1], or the sides are not ascending above 0.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        small_offset: float = -0.1,
        large_offset: float = 0.1,
        small_side: float = 32.0,
        large_side: float = 96.0,
        class_agnostic: bool = False,
    ) -> None:
        small, large = threshold + small_offset, threshold + large_offset
        names = ("threshold", "threshold + small_offset", "threshold + large_offset")
        check_share("SizeAdaptiveNMS", **dict(zip(names, (threshold, small, large), strict=True)))
        if not 0.0 < small_side < large_side < math.inf:
            raise ValueError(
                f"SizeAdaptiveNMS: small_side is {small_side} and large_side {large_side}; they must be pixels "
                "above 0, the second larger"
            )
        self.threshold = threshold
        self.offsets = (small_offset, large_offset)
        self.sides = (small_side, large_side)
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``(K,)`` and scores ``(K,)``, best first; see ``Suppression``."""
        corners, values, classes = on_host("SizeAdaptiveNMS", boxes, scores, labels)
        classes = torch.zeros_like(classes) if self.class_agnostic else classes
        thresholds = size_thresholds(corners, self.threshold, self.offsets, self.sides)  # (N,)
        keep = greedy_nms(corners, values, classes, thresholds)  # (K,)
        return keep.to(boxes.device), values[keep].to(scores.device)

    def __repr__(self) -> str:
        return (
            f"SizeAdaptiveNMS(threshold={self.threshold}, small_offset={self.offsets[0]}, "
            f"large_offset={self.offsets[1]}, small_side={self.sides[0]}, large_side={self.sides[1]}, "
            f"class_agnostic={self.class_agnostic})"
        )


class DensityAdaptiveNMS:
    """Greedy NMS per label with a threshold that rises in crowds: N_M = max(threshold, d_M).

    Three steps: greedy NMS at ``duplicate_iou`` leaves the peaks, of which those that score at least ``object_score``
    are taken for objects; d of a box is its largest IoU with an object other than its own (up to ``duplicate_iou``);
    greedy NMS, where M drops those that overlap it more than N_M. Where nothing is crowded that is greedy NMS at the
    threshold. Computed on the host: for tensors on a GPU it waits for them.

    Args:
        threshold: N_t of the paper, which holds where nothing is crowded, in [0, ``duplicate_iou``].
        duplicate_iou: boxes of one label that overlap more are of one object, whatever the density, in [0, 1].
        object_score: what scores less is not taken for an object, and makes no place crowded.
        class_agnostic: boxes of different labels suppress each other, and make a crowd, too.

    Raises:
        ValueError: an IoU lies outside [0, 1], or the threshold above ``duplicate_iou``.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        duplicate_iou: float = 0.7,
        object_score: float = 0.5,
        class_agnostic: bool = False,
    ) -> None:
        check_share("DensityAdaptiveNMS", threshold=threshold, duplicate_iou=duplicate_iou)
        if threshold > duplicate_iou:
            raise ValueError(
                f"DensityAdaptiveNMS: threshold is {threshold} and duplicate_iou {duplicate_iou}; boxes that overlap "
                "more than duplicate_iou are dropped in any case, so it must be at least the threshold"
            )
        self.threshold = threshold
        self.duplicate_iou = duplicate_iou
        self.object_score = object_score
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``(K,)`` and scores ``(K,)``, best first; see ``Suppression``."""
        corners, values, classes = on_host("DensityAdaptiveNMS", boxes, scores, labels)
        classes = torch.zeros_like(classes) if self.class_agnostic else classes
        equal = torch.full((len(values),), self.duplicate_iou, dtype=torch.float64)  # (N,)
        peaks = greedy_nms(corners, values, classes, equal)  # (P,)
        objects = peaks[values[peaks] >= self.object_score]  # (Q,)
        density = crowd_density(corners, classes, objects, self.duplicate_iou)  # (N,)
        keep = greedy_nms(corners, values, classes, density.clamp(min=self.threshold))  # (K,)
        return keep.to(boxes.device), values[keep].to(scores.device)

    def __repr__(self) -> str:
        return (
            f"DensityAdaptiveNMS(threshold={self.threshold}, duplicate_iou={self.duplicate_iou}, "
            f"object_score={self.object_score}, class_agnostic={self.class_agnostic})"
        )
