"""Smooth L1 of `"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_ (equation 3).

Not in the equation: the turning point beta of Faster R-CNN's published code; quadratic below it, linear above.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


def smooth_l1(prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, beta: float = 1 / 9) -> Tensor:
    """Return the summed loss, a scalar; 0 for empty input.

    Args:
        prediction: ``(..., 4)`` box deltas.
        target: the same shape.
        weights: ``(...)``, the weight of each box; ``None`` weighs all by 1.
        beta: difference at which the loss turns linear; 0 is plain L1.
    """
    if weights is None:
        return F.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")
    loss = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")  # (..., 4)
    return (loss.sum(dim=-1) * weights).sum()


class SmoothL1(nn.Module):
    """Summed smooth L1 as a constructor argument of a model.

    Args:
        beta: difference at which the loss turns linear; 1 / 9 in Faster R-CNN, 0 is plain L1.

    Raises:
        ValueError: ``beta`` is negative.
    """

    of_boxes: ClassVar[bool] = False  # but of what a coder makes of them

    def __init__(self, *, beta: float = 1 / 9) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"SmoothL1: beta is {beta}; it must not be negative")
        self.beta = beta

    def forward(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over all elements, a scalar; see ``smooth_l1``."""
        return smooth_l1(prediction, target, weights, beta=self.beta)
