"""The weight map that teaches a segmenter to keep touching objects apart.

Ronneberger et al. 2015, "U-Net" (arXiv:1505.04597), equation 2. The class-balancing part w_c is left to class weights;
what is computed here is 1 plus the separation term, on background pixels alone.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from detseg.structures.maps import IGNORE_INDEX


def connected_regions(labels: Tensor, *, background: int = 0, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the connected regions of each class of a map, for maps whose objects nobody told apart.

    Args:
        labels: ``(H, W)`` int64.
        background: the label that is no object.
        ignore_index: likewise.

    Returns:
        ``(N, H, W)`` bool on the device of the labels; pixels that touch at a corner belong together.
    """
    given = labels.cpu().numpy()
    masks = [torch.zeros(0, *labels.shape, dtype=torch.bool)]  # (N, H, W) each
    for label in np.unique(given[(given != background) & (given != ignore_index)]):
        count, numbers = cv2.connectedComponents((given == label).astype(np.uint8), connectivity=8)
        masks.append(torch.from_numpy(numbers)[None] == torch.arange(1, count)[:, None, None])
    return torch.cat(masks).to(labels.device)


def separation_weights(masks: Tensor, *, strength: float = 10.0, sigma: float = 5.0) -> Tensor:
    """Return ``1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`` per pixel, d1 and d2 the distances to the two nearest objects.

    Args:
        masks: ``(N, H, W)`` bool, the objects of one image.
        strength: w0 of the paper.
        sigma: in pixels.

    Returns:
        ``(H, W)`` float32, 1 inside objects and wherever fewer than two objects exist; on the device of ``masks``.
    """
    height, width = masks.shape[-2:]
    nearest = np.full((2, height, width), np.inf, dtype=np.float32)  # (2, H, W): d1 <= d2
    for mask in masks[masks.flatten(1).any(dim=1)].cpu().numpy():
        outside = np.logical_not(mask).astype(np.uint8)  # (H, W)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)  # (H, W) to the object
        nearest[1] = np.minimum(nearest[1], np.maximum(nearest[0], distance))
        nearest[0] = np.minimum(nearest[0], distance)
    weights = 1 + strength * np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * sigma**2))  # (H, W)
    return torch.from_numpy(np.where(nearest[0] == 0, 1, weights).astype(np.float32)).to(masks.device)
