"""Pure functions on boxes ``(..., 4)`` in xyxy pixels; what torchvision.ops has is used, not rewritten.

Letters: B images, N boxes, M ground-truth boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

__all__ = ["box_area", "box_iou", "clip_boxes", "intersection_over_first", "large_enough"]


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes to their images; an infinite coordinate becomes the image's border, NaN stays NaN.

    Args:
        boxes: ``(N, 4)`` of one image, or ``(B, N, 4)`` of a batch.
        sizes: (height, width), ``(2,)`` for one image or ``(B, 2)`` for a batch.

    Returns:
        boxes of the same shape with 0 <= x <= width and 0 <= y <= height.
    """
    corner = sizes.to(boxes).flip(-1).unsqueeze(-2)  # (B, 1, 2) as width, height
    limits = torch.cat([corner, corner], dim=-1)  # (B, 1, 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Return a bool mask ``(...,)`` of boxes whose sides reach ``min_size`` pixels; NaN and inverted ones do not."""
    sides = boxes[..., 2:] - boxes[..., :2]  # (..., 2)
    return (sides >= min_size).all(dim=-1) & boxes.isfinite().all(dim=-1)  # (...,)


def intersection_over_first(first: Tensor, second: Tensor) -> Tensor:
    """Return the share of each ``first`` box that each ``second`` box covers (COCO's overlap with a crowd region).

    Args:
        first: ``(N, 4)``.
        second: ``(M, 4)``.

    Returns:
        ``(N, M)`` in [0, 1]; 0 where a first box has no area.
    """
    top_left = torch.maximum(first[:, None, :2], second[None, :, :2])  # (N, M, 2)
    bottom_right = torch.minimum(first[:, None, 2:], second[None, :, 2:])  # (N, M, 2)
    inner = (bottom_right - top_left).clamp(min=0).prod(dim=-1)  # (N, M)
    area: Tensor = box_area(first)  # (N,)
    return inner / area[:, None].clamp(min=torch.finfo(first.dtype).tiny)  # (N, M)
