"""Penalty-reduced focal loss of heatmaps: Law and Deng, CornerNet, 2018, arXiv:1808.01244, equation 1.

CenterNet takes it over (Zhou et al. 2019, arXiv:1904.07850, equation 1). Cells of objects are positive; the closer a
negative cell lies to one, thus the larger its Gaussian, the less it costs. Summed, not yet divided by the number of
objects. Computed like ``losses/focal.py``: one pass over all cells as negatives, the few positive ones written over
them, and a single tensor kept for the backward pass.

Letters: B images, K classes, H and W rows and columns.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detseg.losses.focal import negative_terms


def heatmap_focal_loss(
    logits: Tensor, heat: Tensor, ignored: Tensor | None = None, *, alpha: float = 2.0, beta: float = 4.0
) -> Tensor:
    """Return the summed loss, a scalar in float32 or wider.

    A cell with heat 1 costs ``-(1 - p) ** alpha * log(p)``, any other
    ``-(1 - heat) ** beta * p ** alpha * log(1 - p)``, where p is the sigmoid of its logit.

    Args:
        logits: ``(B, K, H, W)`` before the sigmoid.
        heat: ``(B, K, H, W)`` in [0, 1], exactly 1 at the cells of objects.
        ignored: ``(B, H, W)`` bool: negative cells that cost nothing, as in crowd regions; ``None``: there are none.
        alpha: the focusing exponent, >= 0.
        beta: how fast the cost of a negative cell falls towards an object, >= 0.

    Raises:
        ValueError: the shapes disagree.
    """
    wanted = (logits.shape[0], *logits.shape[2:])
    if logits.ndim != 4 or heat.shape != logits.shape or (ignored is not None and ignored.shape != wanted):
        given = tuple(logits.shape), tuple(heat.shape), None if ignored is None else tuple(ignored.shape)
        raise ValueError(
            f"heatmap_focal_loss: logits, heat, ignored have shapes {given}; they must be (B, K, H, W), the same, and "
            "(B, H, W)"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # sums over 1e6 cells and the logs of small probabilities need it
    return cast(Tensor, _HeatmapFocalLoss.apply(logits, heat, ignored, alpha, beta))


class HeatmapFocalLoss(nn.Module):
    """The loss with its two exponents; see ``heatmap_focal_loss``.

    Args:
        alpha: the focusing exponent, >= 0; 2 in both papers.
        beta: how fast the cost of a negative cell falls towards an object, >= 0; 4 in both papers.

    Raises:
        ValueError: an exponent is negative.
    """

    def __init__(self, *, alpha: float = 2.0, beta: float = 4.0) -> None:
        super().__init__()
        if alpha < 0.0 or beta < 0.0:
            raise ValueError(f"HeatmapFocalLoss: alpha is {alpha} and beta {beta}; neither may be negative")
        self.alpha = alpha
        self.beta = beta

    def forward(self, logits: Tensor, heat: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Return the sum over all cells ``(B, K, H, W)``; see ``heatmap_focal_loss``."""
        return heatmap_focal_loss(logits, heat, ignored, alpha=self.alpha, beta=self.beta)


class _HeatmapFocalLoss(torch.autograd.Function):
    """The sum is linear in the loss of each cell, so the gradient is ready as soon as the loss is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, heat: Tensor, ignored: Tensor | None, alpha: float, beta: float) -> Tensor:
        """Return the sum, and keep the slope of every cell."""
        wanted = ctx.needs_input_grad[0]
        loss, slope = negative_terms(logits, 1.0, alpha, slope=wanted)  # (B, K, H, W) each
        discount = (1 - heat).pow(beta).to(loss)  # (B, K, H, W)
        if ignored is not None:
            discount.masked_fill_(ignored[:, None], 0.0)
        loss.mul_(discount)
        peaks = (heat == 1).nonzero(as_tuple=True)  # 4 x (P,)
        # A positive cell is a negative one with the sign of its logit changed, at its full price.
        loss[peaks], rise = negative_terms(-logits[peaks], 1.0, alpha, slope=wanted)
        if slope is not None and rise is not None:
            slope.mul_(discount)
            slope[peaks] = -rise
            ctx.save_for_backward(slope)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the logits ``(B, K, H, W)``."""
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None
