"""Focal loss: Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv:1708.02002, equation 5.

Built: the alpha-balanced sigmoid form, summed over all references and classes, from class numbers instead of one-hot
targets. Differs from ``torchvision.ops.sigmoid_focal_loss``, to which it is equal, in cost alone: nearly all entries
are negative, so their loss and gradient are computed in one pass without targets, and the few positive ones are
written over them. One tensor of the size of the logits is kept for the backward pass instead of about eight.

Letters: R references (anchors or points) of all images, K classes, P positive references.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Return the summed focal loss, a scalar in float32 or wider.

    Args:
        logits: ``(R, K)`` before the sigmoid.
        labels: ``(R,)`` int64: the class of each reference, or negative for background.
        weights: ``(R,)``, the weight of each reference, 0 for ignored ones; ``None`` weighs all by 1.
        alpha: weight of positive entries in [0, 1]; negative ones weigh 1 - alpha.
        gamma: the focusing exponent, >= 0; 0 is cross entropy.

    Raises:
        ValueError: the shapes disagree.
    """
    check_shapes("focal_loss", logits, labels, weights)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # sums over 1e6 entries and the logs of small probabilities need it
    return cast(Tensor, _FocalLoss.apply(logits, labels, weights, alpha, gamma))


def check_shapes(name: str, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    """Raise a ``ValueError`` with all shapes where they are not ``(R, K)``, ``(R,)`` and, if given, ``(R,)``."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or (weights is not None and weights.shape != labels.shape):
        given = tuple(logits.shape), tuple(labels.shape), None if weights is None else tuple(weights.shape)
        raise ValueError(f"{name}: logits, labels, weights have shapes {given}; they must be (R, K), (R,), (R,)")


class FocalLoss(nn.Module):
    """The focal loss with its two numbers; see ``focal_loss``. Its targets are hard: a quality is not read.

    Args:
        alpha: weight of positive entries in [0, 1]; 0.25 is the paper's best with gamma 2.
        gamma: the focusing exponent, >= 0.

    Raises:
        ValueError: a number outside of its range.
    """

    wants_quality: ClassVar[bool] = False  # see detseg.losses.quality.ClassificationLoss

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0 or gamma < 0.0:
            raise ValueError(f"FocalLoss: alpha is {alpha} and gamma {gamma}; alpha must be in [0, 1] and gamma >= 0")
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, quality: Tensor | None = None
    ) -> Tensor:
        """Return the sum over references ``(R, K)`` and classes; see ``focal_loss``."""
        return focal_loss(logits, labels, weights, alpha=self.alpha, gamma=self.gamma)

    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each entry ``(R, K)``, unweighted and without a gradient."""
        return _loss_and_slope(logits.detach(), labels, self.alpha, self.gamma, slope=False)[0]


def negative_share(entries: Tensor, logits: Tensor, labels: Tensor, *, easy: float = 0.1) -> Tensor:
    """Return which share of a classification loss comes from easy negatives, a scalar in [0, 1].

    Args:
        entries: ``(R, K)``, the loss of each entry, such as ``FocalLoss.entries`` gives.
        logits: ``(R, K)``, without ignored references.
        labels: ``(R,)`` int64, negative for background.
        easy: a negative entry is easy where its probability is below this.
    """
    negative = torch.ones_like(entries, dtype=torch.bool)
    positive = (labels >= 0).nonzero()[:, 0]  # (P,)
    negative[positive, labels[positive]] = False
    total = entries.sum().clamp(min=torch.finfo(entries.dtype).tiny)
    return (entries * (negative & (logits.sigmoid() < easy))).sum() / total


class _FocalLoss(torch.autograd.Function):
    """The sum is linear in the loss of each entry, so the gradient is ready as soon as the loss is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, alpha: float, gamma: float) -> Tensor:
        """Return the sum, and keep the slope of every entry; see ``focal_loss``."""
        loss, slope = _loss_and_slope(logits, labels, alpha, gamma, slope=ctx.needs_input_grad[0])
        if slope is not None:
            ctx.save_for_backward(slope if weights is None else slope.mul_(weights[:, None]))
        # Not a dot product: it adds up 1e5 rows one after the other, which costs three digits in float32.
        return loss.sum() if weights is None else (loss.sum(dim=1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the logits ``(R, K)``."""
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None


def _loss_and_slope(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each entry ``(R, K)`` and, when asked for, its derivative."""
    loss, derivative = negative_terms(logits, 1 - alpha, gamma, slope=slope)
    positive = (labels >= 0).nonzero()[:, 0]  # (P,)
    classes = labels[positive]  # (P,)
    # A positive entry is a negative one with the sign of its logit changed and the other weight.
    own, own_slope = negative_terms(-logits[positive, classes], alpha, gamma, slope=slope)  # (P,) each
    loss[positive, classes] = own
    if derivative is not None and own_slope is not None:
        derivative[positive, classes] = -own_slope
    return loss, derivative


def negative_terms(logits: Tensor, scale: float, gamma: float, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``scale * p ** gamma * -log(1 - p)`` with p = sigmoid(logits), and its derivative when ``slope`` is set.

    The derivative is ``scale * p ** gamma * (gamma * (1 - p) * -log(1 - p) + p)`` (the paper's appendix B). Both are
    new tensors of the shape of ``logits``.
    """
    probability = logits.sigmoid()
    entropy = F.softplus(logits)  # -log(1 - p)
    factor = probability.square() if gamma == 2.0 else probability.pow(gamma)
    factor.mul_(scale)
    derivative = None
    if slope:
        derivative = (1 - probability).mul_(entropy).mul_(gamma).add_(probability).mul_(factor)
    return factor.mul_(entropy), derivative
