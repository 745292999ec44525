"""Objects that teach, and crowd regions that only say where background is uncertain.

COCO marks groups as crowds. As in Detectron (``TRAIN.CROWD_FILTER_THRESH = 0.7``), nothing is learnt from a box that
lies mostly inside a crowd: neither that it is an object nor that it is background. torchvision knows no crowds.
"""

from __future__ import annotations

from torch import Tensor

from detseg.ops.boxes import intersection_over_first, large_enough
from detseg.structures import Target

MIN_SIDE = 1e-3
"""Pixels; a truth box thinner than this has no area to learn from."""


def learnable(target: Target) -> Target:
    """Return the objects that a detector learns: no crowds, no boxes without area. Their order stays."""
    keep = ~target.iscrowd & large_enough(target.boxes, MIN_SIDE)  # (N,)
    return target if bool(keep.all()) else target[keep]


def inside_crowd(boxes: Tensor, target: Target, overlap: float) -> Tensor | None:
    """Return which boxes lie inside one of the target's crowd regions, or ``None`` where it has no crowd.

    Args:
        boxes: ``(N, 4)`` xyxy pixels.
        target: of the same image.
        overlap: share of a box, in (0, 1], from which it counts as inside.

    Returns:
        ``(N,)`` bool, or ``None``.
    """
    if not bool(target.iscrowd.any()):
        return None
    return (intersection_over_first(boxes, target.boxes[target.iscrowd]) >= overlap).any(dim=1)  # (N,)
