"""Squared differences: the loss of boxes in Simonyan & Zisserman 2014 (arXiv:1409.1556, appendix A) and in the YOLOs.

Redmon et al. 2016 (arXiv:1506.02640, equation 3) and Redmon & Farhadi 2018 (arXiv:1804.02767, section 2.1) sum it over
the coordinates of a box, as is done here.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the summed squared difference, a scalar; 0 for empty input.

    Args:
        prediction: ``(..., D)``.
        target: the same shape.
        weights: ``(...)``, the weight of each row; ``None`` weighs all by 1.
    """
    loss = (prediction - target).square()  # (..., D)
    return loss.sum() if weights is None else (loss.sum(dim=-1) * weights).sum()


class SquaredError(nn.Module):
    """The summed squared difference as a constructor argument of a model; see ``squared_error``."""

    of_boxes: ClassVar[bool] = False  # but of what a coder makes of them

    def forward(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over all elements ``(..., D)``, each row weighted by ``weights`` (...), a scalar."""
        return squared_error(prediction, target, weights)
