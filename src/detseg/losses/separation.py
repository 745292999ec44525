"""The weight map that teaches a segmenter to keep touching objects apart.

Ronneberger et al. 2015, "U-Net" (arXiv:1505.04597), equation 2. The class-balancing part w_c is left to class weights;
what is computed here is 1 plus the separation term, on background pixels alone.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor


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
