"""Boundary loss: how far a soft map strays from the border of the truth.

Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation" (arXiv:1812.07032), equations 5 to 7: the
probability of a class, times the signed distance to its border, positive outside and negative inside. It is meant
beside a loss of regions. Differs from the paper: the mean is over valid pixels and classes, so it does not depend on
the size of images, distances are in pixels, and those that do not count lie on no side of a border.

B = images, K = classes, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from detseg.losses.map_loss import ClassesLoss, chosen_classes, widen
from detseg.losses.normalise import normaliser
from detseg.structures.maps import IGNORE_INDEX


def signed_distances(labels: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the distance of each pixel to the border of each class.

    Args:
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``, which is no class.
        num_classes: K.
        ignore_index: label of pixels that do not count, such as padding; their distances are 0.

    Returns:
        ``(B, K, H, W)`` float32, pixels: outside, to the nearest pixel of the class; inside, 1 minus that to the
        nearest valid pixel of another, so at most 0. A class that has none or all of an image's valid pixels has no
        border: 0.
    """
    result = np.zeros((len(labels), num_classes, *labels.shape[1:]), dtype=np.float32)  # (B, K, H, W)
    given = labels.detach().cpu().numpy()
    for image, own in zip(result, given, strict=True):
        valid = own != ignore_index  # (H, W)
        shown = np.unique(own[valid])
        for label in shown if len(shown) > 1 else ():
            inside = own == label  # (H, W)
            # Not the rest of the image: an end of the valid pixels is no border, or padding would be worth reaching.
            away, deep = (
                cv2.distanceTransform((~side).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                for side in (inside, valid & ~inside)
            )  # (H, W) to the nearest pixel of the class, of another
            image[label] = np.where(inside, 1 - deep, away)
        image[:, ~valid] = 0
    return torch.from_numpy(result).to(labels.device)


def boundary_loss(
    logits: Tensor, labels: Tensor, *, classes: Sequence[int] | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return the mean over valid pixels and classes of probability times signed distance.

    Args:
        logits: ``(B, K, H, W)``.
        labels: ``(B, H, W)`` int64 in 0..K-1 or ``ignore_index``.
        classes: to average over, ``None`` for all.
        ignore_index: label of pixels that do not count.

    Returns:
        scalar, in pixels; below 0 for a good map, zero where no pixel counts.
    """
    probabilities = widen(logits).softmax(dim=1)  # (B, K, H, W)
    distances = signed_distances(labels, logits.shape[1], ignore_index=ignore_index)  # (B, K, H, W)
    sums = (probabilities * distances.to(probabilities.dtype)).sum(dim=(0, 2, 3))  # (K,)
    return chosen_classes(sums, classes).mean() / normaliser((labels != ignore_index).sum().float())


class BoundaryLoss(ClassesLoss):
    """Probability times signed distance; see ``boundary_loss``.

    Args:
        classes: to average over; ``None`` means all.
        weight: factor; the paper raises it from 0.01 while the regions' loss falls.
        ignore_index: label of pixels that do not count.
    """

    name = "boundary"

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return the mean over the chosen classes."""
        return boundary_loss(logits, labels, classes=self.classes, ignore_index=self.ignore_index)
