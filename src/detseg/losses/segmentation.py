"""Losses of semantic segmentation: pixel-wise cross entropy and soft Dice, with an ignore index.

Cross entropy with a weight per pixel: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image
Segmentation" (arXiv:1505.04597), equation 1. The paper sums over pixels; here the weighted mean over all valid pixels
of the batch is taken, so that the learning rate does not depend on the size of images.
Soft Dice: Milletari et al. 2016, "V-Net" (arXiv:1606.04797), section 3, per class. Differing from it, the denominator
has no squares unless asked (as in Sudre et al. 2017, arXiv:1707.03237), and the sums run over the whole batch, so a
class absent from one image does not count as missed there.

B = images, K = classes, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.losses.map_loss import check_class_weights, check_pixel_weights, weights_of_classes, widen
from detseg.losses.normalise import normaliser, sum_over_ranks
from detseg.structures.maps import IGNORE_INDEX


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return the weighted mean cross entropy over all valid pixels of a batch, in training that of all ranks.

    It is zero where no pixel is valid.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        class_weights: ``(K,)``, as in ``torch.nn.CrossEntropyLoss``.
        pixel_weights: ``(B, H, W)``, w(x) of equation 1.
        ignore_index: label of pixels that do not count.
    """
    logits = widen(logits)
    valid = labels != ignore_index  # (B, H, W)
    losses = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=ignore_index, reduction="none")
    weights = valid.to(losses.dtype)  # (B, H, W)
    if class_weights is not None:
        weights = weights * class_weights[labels.where(valid, 0)]  # (B, H, W)
    if pixel_weights is not None:
        losses, weights = losses * pixel_weights, weights * pixel_weights  # (B, H, W)
    return losses.sum() / normaliser(weights.sum(), least=torch.finfo(losses.dtype).eps)


def class_sums(
    logits: Tensor, labels: Tensor, *, squared: bool = False, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what overlaps are made of, summed over the valid pixels of a batch, in training that of all ranks.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        squared: sum the squares of the probabilities in the second.
        ignore_index: label of pixels that do not count.

    Returns:
        ``(K,)`` each, per class: probabilities where the truth is that class; probabilities; pixels of the truth.
    """
    classes = logits.shape[1]
    valid = labels != ignore_index  # (B, H, W)
    probabilities = widen(logits).softmax(dim=1)  # (B, K, H, W)
    powers = probabilities.square() if squared else probabilities
    predicted = (powers * valid[:, None]).sum(dim=(0, 2, 3))  # (K,)
    # No one-hot maps, which for many classes take six times the memory of the logits.
    label = labels.where(valid, 0)  # (B, H, W)
    likely = probabilities.gather(1, label[:, None])[:, 0] * valid  # (B, H, W) of the true class
    # One by one, 1e6 pixels are beyond float32. Not bincount's weights, which a GPU adds up in any order.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    both = likely.new_zeros(classes, dtype=wide).index_add(0, label.flatten(), likely.flatten().to(wide))  # (K,)
    truth = torch.bincount(labels.where(valid, classes).flatten(), minlength=classes + 1)[:-1]  # (K,)
    summed = sum_over_ranks(torch.stack([both.to(predicted.dtype), predicted, truth.to(predicted.dtype)]))  # (3, K)
    return summed[0], summed[1], summed[2]


def dice_scores(
    logits: Tensor, labels: Tensor, *, smooth: float = 1.0, squared: bool = False, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return the soft Dice coefficient of each class over a batch, in training that of all ranks, ``(K,)`` in [0, 1].

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        smooth: added to numerator and denominator, in pixels; a class that is absent and not predicted scores 1.
        squared: V-Net's denominator, of squares.
        ignore_index: label of pixels that do not count.
    """
    both, predicted, truth = class_sums(logits, labels, squared=squared, ignore_index=ignore_index)  # (K,) each
    below = predicted + truth + smooth  # (K,)
    return torch.where(below > 0, (2 * both + smooth) / below.clamp(min=torch.finfo(below.dtype).tiny), 1.0)


def dice_loss(logits: Tensor, labels: Tensor, *, smooth: float = 1.0, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return one minus the mean soft Dice coefficient over classes; arguments as of ``dice_scores``."""
    return 1 - dice_scores(logits, labels, smooth=smooth, ignore_index=ignore_index).mean()


class SegmentationLoss(nn.Module):
    """Cross entropy and soft Dice, each with a factor; a term with factor 0 is left out.

    Args:
        cross_entropy: factor of the cross entropy.
        dice: factor of the Dice loss.
        class_weights: one number per class for the cross entropy, or ``None`` for equal weights.
        smooth: of the Dice loss, in pixels.
        ignore_index: label of pixels that do not count.

    Attributes:
        weighs_pixels: whether weights of pixels are taken: by the cross entropy, not by the Dice loss.
        terms: what ``forward`` returns, by name.

    Raises:
        ValueError: both factors are zero, or one is negative.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        cross_entropy: float = 1.0,
        dice: float = 0.0,
        class_weights: Sequence[float] | None = None,
        smooth: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        if min(cross_entropy, dice) < 0 or cross_entropy + dice == 0:
            raise ValueError(f"SegmentationLoss: cross_entropy {cross_entropy} and dice {dice}; one must be above 0")
        self.cross_entropy, self.dice = cross_entropy, dice
        self.weighs_pixels = cross_entropy > 0
        self.smooth, self.ignore_index = smooth, ignore_index
        factors = {"loss_cross_entropy": cross_entropy, "loss_dice": dice}
        self.terms = tuple(name for name, factor in factors.items() if factor)
        self.register_buffer("class_weights", weights_of_classes(class_weights), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``{"loss_cross_entropy": ..., "loss_dice": ...}``, scalars.

        Args:
            logits: ``(B, K, H, W)``.
            labels: ``(B, H, W)`` int64 in 0..K-1 or the ignore index.
            pixel_weights: ``(B, H, W)`` for the cross entropy, or ``None``.

        Raises:
            ValueError: the number of class weights is not that of the logits' classes, or there are weights of pixels
                and no cross entropy.
        """
        check_pixel_weights(self, self.weighs_pixels, pixel_weights)
        check_class_weights(self, self.class_weights, logits.shape[1])
        terms: dict[str, Tensor] = {}
        if self.cross_entropy:
            terms["loss_cross_entropy"] = self.cross_entropy * cross_entropy(
                logits,
                labels,
                class_weights=self.class_weights,
                pixel_weights=pixel_weights,
                ignore_index=self.ignore_index,
            )
        if self.dice:
            loss = dice_loss(logits, labels, smooth=self.smooth, ignore_index=self.ignore_index)
            terms["loss_dice"] = self.dice * loss
        return terms
