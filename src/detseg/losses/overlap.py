"""Losses that measure the overlap of a soft map with the truth, class by class: Dice, Jaccard, Tversky, Lovasz.

Dice: Milletari et al. 2016, "V-Net" (arXiv:1606.04797, section 3), with squares in the denominator; without them
Sudre et al. 2017 (arXiv:1707.03237). Jaccard: Rahman & Wang 2016, "Optimizing Intersection-Over-Union in Deep Neural
Networks" (ISVC). Tversky: Salehi et al. 2017 (arXiv:1706.05721), equation 2.
Lovasz-softmax: Berman et al. 2018, "The Lovasz-Softmax Loss" (arXiv:1705.08790), equations 8 and 9 and algorithm 1.

The first three sum over the whole batch, in training over that of all ranks; the Lovasz extension sorts the pixels of
one rank's batch.

B = images, K = classes, H, W = pixels, V = valid pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detseg.losses.map_loss import ClassesLoss, chosen_classes, widen
from detseg.losses.segmentation import class_sums, dice_scores
from detseg.structures.maps import IGNORE_INDEX


def tversky_scores(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return the soft Tversky index of each class over a batch, ``(K,)`` in [0, 1].

    ``alpha = beta = 1`` is the Jaccard index, ``alpha = beta = 0.5`` Dice's with half of its ``smooth``.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        alpha: what a false positive costs.
        beta: what a false negative costs.
        smooth: added to numerator and denominator, in pixels.
        ignore_index: label of pixels that do not count.
    """
    both, predicted, truth = class_sums(logits, labels, ignore_index=ignore_index)  # (K,) each
    above = both + smooth
    below = above + alpha * (predicted - both) + beta * (truth - both)  # (K,)
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), 1.0)


def lovasz_softmax(
    logits: Tensor, labels: Tensor, *, classes: Sequence[int] | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return the Lovasz extension of the Jaccard loss, averaged over the classes that the truth shows.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        classes: to average over, ``None`` for all; those absent from the truth are left out.
        ignore_index: label of pixels that do not count.

    Returns:
        scalar in [0, 1]; zero where no such class is shown.
    """
    probabilities = widen(logits).softmax(dim=1)  # (B, K, H, W)
    flat = labels.flatten()  # (B * H * W,)
    place = (flat != ignore_index).nonzero()[:, 0]  # (V,)
    valid = flat[place]  # (V,) labels
    shown = torch.bincount(valid, minlength=logits.shape[1]).tolist()  # K numbers of pixels
    if len(shown) > logits.shape[1]:
        raise ValueError(
            f"lovasz_softmax: the truth holds label {len(shown) - 1}, but the model has {logits.shape[1]}: "
            f"0..{logits.shape[1] - 1}"
        )
    planes = probabilities.unbind(dim=1)  # K of (B, H, W); one backward pass for all, which indexing would repeat
    chosen = [label for label in chosen_classes(torch.arange(len(shown)), classes).tolist() if shown[label]]
    # All slopes first and in one piece: a CPU's heap, full of gaps that sorting left between them, took twice as much.
    slopes = probabilities.new_empty(len(chosen), len(valid))  # (shown and chosen, V)
    with torch.no_grad():
        for own, label in zip(slopes, chosen, strict=True):
            truth = valid == label
            own.copy_(lovasz_gradient(lovasz_errors(planes[label], truth, place), truth))
    losses = [  # no inner products, which autocast would take in 16 bits
        (lovasz_errors(planes[label], valid == label, place) * own).sum()
        for own, label in zip(slopes, chosen, strict=True)
    ]
    return torch.stack(losses).mean() if losses else probabilities.sum() * 0.0


def lovasz_errors(plane: Tensor, truth: Tensor, place: Tensor) -> Tensor:
    """Return by how much each valid pixel misses the truth about one class, ``(V,)`` in [0, 1] (equation 8).

    Args:
        plane: ``(B, H, W)``, the probability of the class.
        truth: ``(V,)`` bool, whether a valid pixel is of the class.
        place: ``(V,)`` int64, where the valid pixels are among all.
    """
    likely = plane.flatten().index_select(0, place)  # (V,)
    return torch.where(truth, 1 - likely, likely)


@torch.no_grad()
def lovasz_gradient(errors: Tensor, truth: Tensor) -> Tensor:
    """Return the gradient of the Lovasz extension of the Jaccard loss by the errors of one class (algorithm 1).

    Args:
        errors: ``(V,)`` in [0, 1].
        truth: ``(V,)`` bool, whether a pixel is of the class; some are.

    Returns:
        ``(V,)``, at least 0: by how much the Jaccard loss grows when a pixel joins the wrong ones, worst first.
    """
    order = errors.argsort(descending=True, stable=True)  # (V,)
    ranked = truth[order]
    total = ranked.sum()  # whole numbers, as float32 ends at 2 ** 24 and no GPU adds it up in a fixed order
    union = total + (~ranked).cumsum(dim=0)  # (V,) of the truth and all false positives so far
    missed = total - ranked.cumsum(dim=0)  # (V,) of the truth still to come
    jaccard = 1 - missed.to(errors.dtype) / union.to(errors.dtype)  # (V,) loss when all so far are wrong
    steps = torch.diff(jaccard, prepend=jaccard.new_zeros(1))  # (V,)
    return torch.empty_like(steps).scatter(0, order, steps)


class OverlapLoss(ClassesLoss):
    """Base: one minus the mean score of the classes.

    Args:
        smooth: in pixels; at 0 a class absent from the truth scores 0 wherever it is predicted at all.
        classes: to average over, such as ``[1]`` for a binary map's foreground; ``None`` means all.
        weight: factor.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: ``smooth`` is negative.
    """

    def __init__(
        self,
        *,
        smooth: float = 1.0,
        classes: Sequence[int] | None = None,
        weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(classes=classes, weight=weight, ignore_index=ignore_index)
        if smooth < 0:
            raise ValueError(f"{type(self).__name__}: smooth {smooth} must be at least 0 pixels")
        self.smooth = smooth

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return one minus the mean over the chosen classes."""
        return 1 - chosen_classes(self.scores(logits, labels), self.classes).mean()

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the soft score of each class, ``(K,)`` in [0, 1]."""
        raise NotImplementedError


class DiceLoss(OverlapLoss):
    """Soft Dice, ``2 |A and B| / (|A| + |B|)``.

    Args:
        squared: sum the squares of the probabilities in the denominator, as V-Net does.
        smooth: in pixels; see ``OverlapLoss``.
        classes: to average over, ``[1]`` for a binary map's foreground; ``None`` means all.
        weight: factor.
        ignore_index: label of pixels that do not count.
    """

    name = "dice"

    def __init__(
        self,
        *,
        squared: bool = False,
        smooth: float = 1.0,
        classes: Sequence[int] | None = None,
        weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(smooth=smooth, classes=classes, weight=weight, ignore_index=ignore_index)
        self.squared = squared

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the soft Dice coefficients."""
        return dice_scores(
            logits, labels, smooth=self.smooth, squared=self.squared, ignore_index=self.ignore_index
        )  # (K,)


class JaccardLoss(OverlapLoss):
    """Soft Jaccard, ``|A and B| / |A or B|``; arguments as of ``OverlapLoss``."""

    name = "jaccard"

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the soft Jaccard indices."""
        return tversky_scores(
            logits, labels, alpha=1.0, beta=1.0, smooth=self.smooth, ignore_index=self.ignore_index
        )  # (K,)


class TverskyLoss(OverlapLoss):
    """Soft Tversky index, in which false positives and false negatives cost differently.

    Args:
        alpha: what a false positive costs; 0.3 is the paper's best.
        beta: what a false negative costs; 0.7 is the paper's best.
        smooth: in pixels; see ``OverlapLoss``.
        classes: to average over; ``None`` means all.
        weight: factor.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: a cost is negative, or both are 0.
    """

    name = "tversky"

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        smooth: float = 1.0,
        classes: Sequence[int] | None = None,
        weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(smooth=smooth, classes=classes, weight=weight, ignore_index=ignore_index)
        if min(alpha, beta) < 0 or alpha + beta == 0:
            raise ValueError(f"TverskyLoss: alpha {alpha} and beta {beta} must be at least 0, and one above")
        self.alpha, self.beta = alpha, beta

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the soft Tversky indices."""
        return tversky_scores(
            logits, labels, alpha=self.alpha, beta=self.beta, smooth=self.smooth, ignore_index=self.ignore_index
        )  # (K,)


class LovaszLoss(ClassesLoss):
    """Lovasz-softmax over the classes that the batch shows; see ``lovasz_softmax``.

    Args:
        classes: to average over; ``None`` means all.
        weight: factor.
        ignore_index: label of pixels that do not count.
    """

    name = "lovasz"

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return the mean over the chosen classes that are shown."""
        return lovasz_softmax(logits, labels, classes=self.classes, ignore_index=self.ignore_index)
