"""Boxes as distributions: Li et al., Generalized Focal Loss, 2020, arXiv:2006.04388, section 3.

Built: the expectation of a discrete distribution over evenly spaced values (equation 5) and distribution focal loss
(equation 6), for whatever numbers a coder predicts. The paper has distances in strides from 0 to 16, one apart; here
the range is an argument, so that it serves R-CNN's box deltas too. A target outside of the range counts as its end.

Letters: P boxes, n values (bins) per number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detseg.losses.normalise import weighted_sum


def expectation(logits: Tensor, *, low: float, high: float) -> Tensor:
    """Return the expected value of each distribution, ``(...)`` in [low, high] (equation 5).

    Args:
        logits: ``(..., n)`` before the softmax, of n values evenly spaced from ``low`` to ``high``.
        low: the first value.
        high: the last value.
    """
    values = torch.linspace(low, high, logits.shape[-1], dtype=logits.dtype, device=logits.device)  # (n,)
    return (logits.softmax(dim=-1) * values).sum(dim=-1)  # (...)


def distribution_focal_loss(
    logits: Tensor, target: Tensor, weights: Tensor | None = None, *, low: float, high: float
) -> Tensor:
    """Return the summed loss: cross entropy with the two values beside the target, by their closeness (equation 6).

    Args:
        logits: ``(P, 4, n)`` before the softmax, of n >= 2 values evenly spaced from ``low`` to ``high``.
        target: ``(P, 4)``; what lies outside of the range counts as its end.
        weights: ``(P,)``, the weight of each box; ``None`` weighs all by 1.
        low: the first value.
        high: the last value.

    Returns:
        scalar: per box the mean over its four numbers, summed over boxes, as box losses count a box once.
    """
    last = logits.shape[-1] - 1
    place = ((target - low) / (high - low) * last).clamp(0, last)  # (P, 4) in bins
    left = place.floor().clamp(max=last - 1)  # (P, 4)
    share = place - left  # (P, 4) of the right one
    log = logits.log_softmax(dim=-1)  # (P, 4, n)
    index = left.long()[..., None]  # (P, 4, 1)
    beside = log.gather(-1, torch.cat((index, index + 1), dim=-1))  # (P, 4, 2)
    loss = -torch.lerp(beside[..., 0], beside[..., 1], share).mean(dim=-1)  # (P,)
    return weighted_sum(loss, weights)


class DistributionFocalLoss(nn.Module):
    """Distribution focal loss with its values, by which a detector decodes too.

    Args:
        bins: n, the values per number, >= 2.
        low: the first value, in the coder's terms.
        high: the last value.

    Raises:
        ValueError: fewer than two bins, or an empty range.
    """

    def __init__(self, *, bins: int = 17, low: float = 0.0, high: float = 16.0) -> None:
        super().__init__()
        if bins < 2 or not low < high:
            raise ValueError(
                f"DistributionFocalLoss: {bins} bins from {low} to {high}; give at least 2 bins, and low below high"
            )
        self.bins, self.low, self.high = bins, low, high

    def expectation(self, logits: Tensor) -> Tensor:
        """Return the four numbers of each box ``(..., 4)`` from ``(..., 4 * n)``, number by number."""
        return expectation(logits.reshape(*logits.shape[:-1], 4, self.bins), low=self.low, high=self.high)  # (..., 4)

    def forward(self, logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over boxes of ``(P, 4 * n)`` against ``(P, 4)``; see ``distribution_focal_loss``."""
        parted = logits.reshape(*logits.shape[:-1], 4, self.bins)  # (P, 4, n)
        return distribution_focal_loss(parted, target, weights, low=self.low, high=self.high)
