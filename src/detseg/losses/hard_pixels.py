"""Cross entropies that look at hard pixels more than at easy ones.

Online hard example mining: Shrivastava et al. 2016 (arXiv:1604.03540); for pixels as in BiSeNet (Yu et al. 2018,
arXiv:1808.00897): all pixels whose true class is less likely than a threshold, and at least a share of all. Differs in
the share, which is of the valid pixels of the batch, not a number that fits one image size.
Focal loss over classes that exclude one another: Lin et al. 2017 (arXiv:1708.02002), equation 4 with the softmax in
place of the sigmoid.

B = images, K = classes, H, W = pixels, V = valid pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor

from detseg.losses.map_loss import MapLoss, check_class_weights, weights_of_classes, widen
from detseg.losses.normalise import normaliser
from detseg.losses.segmentation import cross_entropy
from detseg.structures.maps import IGNORE_INDEX


def hard_pixels(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    least: float = 1 / 16,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return which pixels are hard, ``(B, H, W)`` bool.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        threshold: a pixel is hard where its class has less than this probability.
        least: share of the valid pixels that is hard whatever the threshold says, rounded up; the hardest of them.
        ignore_index: label of pixels that do not count and are never hard.
    """
    valid = labels != ignore_index  # (B, H, W)
    truth = labels.where(valid, 0)[:, None]  # (B, 1, H, W)
    likely = widen(logits.detach()).softmax(dim=1).gather(1, truth)[:, 0]  # (B, H, W)
    likely = likely.where(valid, math.inf)
    count = math.ceil(least * int(valid.sum()))
    if count:
        threshold_of_least = likely.flatten().kthvalue(count).values  # the hardest `count` are at most this likely
        return valid & ((likely < threshold) | (likely <= threshold_of_least))
    return valid & (likely < threshold)


class HardPixelLoss(MapLoss):
    """Mean cross entropy of the hard pixels alone (OHEM).

    Args:
        threshold: a pixel is hard where its class has less than this probability.
        least: share of the valid pixels that is hard in any case.
        class_weights: one number per class, or ``None``.
        weight: factor.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: a number is outside [0, 1].
    """

    name = "cross_entropy"
    weighs_pixels = True
    class_weights: Tensor | None

    def __init__(
        self,
        *,
        threshold: float = 0.7,
        least: float = 1 / 16,
        class_weights: Sequence[float] | None = None,
        weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index)
        if not (0 <= threshold <= 1 and 0 <= least <= 1):
            raise ValueError(f"HardPixelLoss: threshold {threshold} and least {least} must be in [0, 1]")
        self.threshold, self.least = threshold, least
        self.register_buffer("class_weights", weights_of_classes(class_weights), persistent=False)

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return the mean over the hard pixels.

        Raises:
            ValueError: the number of class weights is not that of the logits' classes.
        """
        check_class_weights(self, self.class_weights, logits.shape[1])
        hard = hard_pixels(
            logits, labels, threshold=self.threshold, least=self.least, ignore_index=self.ignore_index
        )  # (B, H, W)
        return cross_entropy(
            logits,
            labels.where(hard, self.ignore_index),
            class_weights=self.class_weights,
            pixel_weights=pixel_weights,
            ignore_index=self.ignore_index,
        )


def focal_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return the mean of ``-(1 - p)^gamma log p`` over all valid pixels, p the probability of the true class.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        gamma: the focusing exponent, >= 0; 0 is cross entropy.
        pixel_weights: ``(B, H, W)``, or ``None``.
        ignore_index: label of pixels that do not count.
    """
    valid = labels != ignore_index  # (B, H, W)
    losses = F.cross_entropy(widen(logits), labels, ignore_index=ignore_index, reduction="none")  # (B, H, W)
    weights = valid.to(losses.dtype) if pixel_weights is None else valid * pixel_weights  # (B, H, W)
    # 1 - exp(-loss), exact for small losses; kept above 0, where a power below 1 has no finite slope
    doubt = -torch.expm1(-losses)  # (B, H, W)
    focus = doubt.clamp(min=torch.finfo(losses.dtype).tiny) ** gamma  # (B, H, W)
    return (weights * focus * losses).sum() / normaliser(weights.sum(), least=torch.finfo(losses.dtype).eps)


class FocalMapLoss(MapLoss):
    """Focal loss of pixels over classes that exclude one another; see ``focal_cross_entropy``.

    Args:
        gamma: the focusing exponent.
        weight: factor.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: gamma is negative.
    """

    name = "focal"
    weighs_pixels = True

    def __init__(self, *, gamma: float = 2.0, weight: float = 1.0, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index)
        if gamma < 0:
            raise ValueError(f"FocalMapLoss: gamma {gamma} must be at least 0")
        self.gamma = gamma

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return the mean over the valid pixels."""
        return focal_cross_entropy(
            logits, labels, gamma=self.gamma, pixel_weights=pixel_weights, ignore_index=self.ignore_index
        )
