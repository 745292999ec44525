"""Classification losses of dense detectors beside focal loss: cross entropy, and two that learn how good a box is.

Built: binary cross entropy; quality focal loss (Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388, QFL in
section 3), whose target is the IoU of the predicted box instead of 1; varifocal loss (Zhang et al. 2021, VarifocalNet,
arXiv:2008.13367, equation 2), which weighs positives by that target and damps negatives alone. All are summed over
references and classes, and take class numbers instead of one-hot targets: what a background entry costs is computed
for all entries, and the few positive ones are put in.

Letters: R references (anchors or points) of all images, K classes, P positive references.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.focal import check_shapes

Entries = Callable[[Tensor], Tensor]


def bce_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, quality: Tensor | None = None) -> Tensor:
    """Return the summed binary cross entropy, a scalar in float32 or wider.

    Args:
        logits: ``(R, K)`` before the sigmoid.
        labels: ``(R,)`` int64: the class of each reference, or negative for background.
        weights: ``(R,)``, the weight of each reference, 0 for ignored ones; ``None`` weighs all by 1.
        quality: ``(R,)`` in [0, 1], the target of a positive reference for its class; ``None`` is 1 everywhere.

    Raises:
        ValueError: the shapes disagree.
    """
    return _total(bce_entries(logits, labels, quality), labels, weights)


def quality_focal_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    quality: Tensor | None = None,
    *,
    beta: float = 2.0,
) -> Tensor:
    """Return the summed quality focal loss ``|y - p| ** beta * BCE(p, y)``.

    Args:
        logits: as of ``bce_loss``, as all others but the last.
        labels: ``(R,)`` int64.
        weights: ``(R,)`` or ``None``.
        quality: ``(R,)`` or ``None``.
        beta: how fast entries that are nearly right fade, 0 or >= 1; 0 is cross entropy, 2 the paper's.
    """
    return _total(quality_focal_entries(logits, labels, quality, beta=beta), labels, weights)


def varifocal_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    quality: Tensor | None = None,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> Tensor:
    """Return the summed varifocal loss.

    A positive entry costs ``q * BCE(p, q)``, a negative one ``alpha * p ** gamma * BCE(p, 0)``.

    Args:
        logits: as of ``bce_loss``, as the next three.
        labels: ``(R,)`` int64.
        weights: ``(R,)`` or ``None``.
        quality: ``(R,)`` or ``None``.
        alpha: weight of negative entries, >= 0.
        gamma: the focusing exponent of negative entries, 0 or >= 1.
    """
    return _total(varifocal_entries(logits, labels, quality, alpha=alpha, gamma=gamma), labels, weights)


def bce_entries(logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
    """Return the loss of each entry, ``(R, K)``; see ``bce_loss``."""
    return _entries("bce_loss", logits, labels, quality, F.softplus, _bce)


def quality_focal_entries(
    logits: Tensor, labels: Tensor, quality: Tensor | None = None, *, beta: float = 2.0
) -> Tensor:
    """Return the loss of each entry, ``(R, K)``; see ``quality_focal_loss``."""

    def negative(values: Tensor) -> Tensor:
        return values.sigmoid().pow(beta) * F.softplus(values)

    def positive(values: Tensor, target: Tensor) -> Tensor:
        return (target - values.sigmoid()).abs().pow(beta) * _bce(values, target)  # (P,)

    return _entries("quality_focal_loss", logits, labels, quality, negative, positive)


def varifocal_entries(
    logits: Tensor, labels: Tensor, quality: Tensor | None = None, *, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Return the loss of each entry, ``(R, K)``; see ``varifocal_loss``."""

    def negative(values: Tensor) -> Tensor:
        return alpha * values.sigmoid().pow(gamma) * F.softplus(values)

    def positive(values: Tensor, target: Tensor) -> Tensor:
        return target * _bce(values, target)  # (P,)

    return _entries("varifocal_loss", logits, labels, quality, negative, positive)


class ClassificationLoss(Protocol):
    """What a dense detector classifies by: the classes below and ``FocalLoss``.

    Attributes:
        wants_quality: whether the target of a positive is how good its box is. A detector then gives ``quality``: what
            its assigner says, or the IoU of the predicted box with the true one.
    """

    wants_quality: ClassVar[bool]

    def __call__(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, quality: Tensor | None = None, /
    ) -> Tensor:
        """Return the sum over references ``(R, K)`` and classes; arguments as of ``bce_loss``."""
        ...

    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None, /) -> Tensor:
        """Return the loss of each entry ``(R, K)``, unweighted."""
        ...


class EntrywiseLoss(nn.Module, ABC):
    """Base of the classes below: the sum of a loss's entries; see ``ClassificationLoss``."""

    wants_quality: ClassVar[bool] = False

    @abstractmethod
    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each entry ``(R, K)``, unweighted; arguments as of ``forward``."""

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, quality: Tensor | None = None
    ) -> Tensor:
        """Return the sum over references ``(R, K)`` and classes; arguments as of ``bce_loss``."""
        return _total(self.entries(logits, labels, quality), labels, weights)


class BCELoss(EntrywiseLoss):
    """Binary cross entropy, against 1 or, where the assigner says so, against the quality; see ``bce_loss``."""

    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each entry ``(R, K)``; see ``bce_entries``."""
        return bce_entries(logits, labels, quality)


class QualityFocalLoss(EntrywiseLoss):
    """Quality focal loss with its number; see ``quality_focal_loss``.

    Args:
        beta: how fast entries that are nearly right fade, 0 or >= 1 (between the two the slope at the target is
            infinite); 2 is the paper's best.

    Raises:
        ValueError: ``beta`` is out of range.
    """

    wants_quality = True

    def __init__(self, *, beta: float = 2.0) -> None:
        super().__init__()
        if beta != 0.0 and not beta >= 1.0:
            raise ValueError(f"QualityFocalLoss: beta is {beta}; it must be 0 or at least 1")
        self.beta = beta

    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each entry ``(R, K)``; see ``quality_focal_entries``."""
        return quality_focal_entries(logits, labels, quality, beta=self.beta)


class VarifocalLoss(EntrywiseLoss):
    """Varifocal loss with its numbers; see ``varifocal_loss``.

    Args:
        alpha: weight of negative entries, >= 0; 0.75 is the paper's.
        gamma: the focusing exponent of negative entries, 0 or >= 1; 2 is the paper's.

    Raises:
        ValueError: a number is out of range.
    """

    wants_quality = True

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        if not alpha >= 0.0 or (gamma != 0.0 and not gamma >= 1.0):
            raise ValueError(
                f"VarifocalLoss: alpha is {alpha} and gamma {gamma}; alpha must be >= 0 and gamma 0 or at least 1"
            )
        self.alpha, self.gamma = alpha, gamma

    def entries(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Return the loss of each entry ``(R, K)``; see ``varifocal_entries``."""
        return varifocal_entries(logits, labels, quality, alpha=self.alpha, gamma=self.gamma)


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.softplus(logits) - logits * target  # (P,) -(y log p + (1 - y) log(1 - p)), finite for every logit


def _entries(
    name: str,
    logits: Tensor,
    labels: Tensor,
    quality: Tensor | None,
    negative: Entries,
    positive: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return ``negative`` of every logit ``(R, K)``, with ``positive`` of logit and target in the positive places."""
    check_shapes(name, logits, labels, quality)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # sums over 1e6 entries and the logs of small probabilities need it
    rows = (labels >= 0).nonzero()[:, 0]  # (P,)
    classes = labels[rows]  # (P,)
    own = logits[rows, classes]  # (P,)
    target = torch.ones_like(own) if quality is None else quality[rows].to(own.dtype)  # (P,)
    return negative(logits).index_put((rows, classes), positive(own, target))  # (R, K)


def _total(entries: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return entries.sum()
    check_shapes("weights of a loss", entries, labels, weights)
    return (entries.sum(dim=1) * weights).sum()
