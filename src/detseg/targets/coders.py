"""Box regression targets of `"R-CNN" <https://arxiv.org/abs/1311.2524>`_, appendix C, equations 1-9.

They are the centre's offset in anchor sides and the log ratios of the sides.
``encode`` and ``decode`` are inverses. The weights are those of Fast R-CNN's normalised targets. Differs from
torchvision: any leading shape, and sides below a thousandth of a pixel count as such, so that no log is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MIN_SIDE = 1e-3  # pixels; a degenerate box must not give an infinite target


class BoxCoder:
    """Turn boxes into regression targets about anchors, and back.

    Args:
        weights: factors of the targets (dx, dy, dw, dh); (10, 10, 5, 5) for the box head of Fast R-CNN.
        clip: largest dw and dh that ``decode`` believes; log(1000 / 16), a 16-pixel anchor grown to 1000.
    """

    def __init__(self, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), clip: float = math.log(1000.0 / 16)) -> None:
        if len(weights) != 4 or min(weights) <= 0:
            raise ValueError(f"BoxCoder: weights is {list(weights)}; give four positive numbers for dx, dy, dw, dh")
        self.weights = tuple(float(weight) for weight in weights)
        self.clip = clip

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Return the targets ``(..., 4)`` that move ``anchors`` onto ``boxes``, both ``(..., 4)`` xyxy pixels."""
        centre, side = _centre_side(anchors, floor=_MIN_SIDE)  # (..., 2) each
        wanted_centre, wanted_side = _centre_side(boxes, floor=_MIN_SIDE)  # (..., 2) each
        shift = (wanted_centre - centre) / side  # (..., 2), eq. 6-7
        growth = (wanted_side / side).log()  # (..., 2), eq. 8-9
        return torch.cat([shift, growth], dim=-1) * boxes.new_tensor(self.weights)  # (..., 4)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return boxes ``(..., 4)`` xyxy pixels: ``anchors`` moved by ``deltas``; leading shapes broadcast."""
        centre, side = _centre_side(anchors.to(deltas.dtype))  # (..., 2) each
        deltas = deltas / deltas.new_tensor(self.weights)  # (..., 4)
        centre = deltas[..., :2] * side + centre  # (..., 2), eq. 1-2
        half = deltas[..., 2:].clamp(max=self.clip).exp() * side * 0.5  # (..., 2), eq. 3-4
        return torch.cat([centre - half, centre + half], dim=-1)  # (..., 4)

    def __repr__(self) -> str:
        return f"BoxCoder(weights={self.weights}, clip={self.clip:.4g})"


def _centre_side(boxes: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor]:
    side = boxes[..., 2:] - boxes[..., :2]  # (..., 2) as width, height
    centre = boxes[..., :2] + 0.5 * side  # (..., 2) as x, y
    return centre, side if floor is None else side.clamp(min=floor)
