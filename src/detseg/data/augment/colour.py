"""SSD's photometric distortion (Liu et al. 2016, arXiv:1512.02325, section 2.2, after Howard 2013, arXiv:1312.5402).

Drawn, and in the same order, as torchvision's ``RandomPhotometricDistort`` does it, each step with tables and OpenCV
on 8-bit pixels: brightness, contrast (before or after the next two), saturation, hue, order of the channels. Differs
from it by rounding; the hue has 256 steps.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from detseg.data.geometry import Pixels, as_image, as_pixels, turn_hue

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue, as torchvision has them."""


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]  # torchvision has no types
    """Change brightness, contrast, saturation and hue, each with some probability.

    Args:
        probability: of each of the four; SSD's is 0.5.
        channels: probability of reordering the three channels, which SSD's released settings leave out.
    """

    def __init__(self, *, probability: float = 0.5, channels: float = 0.0) -> None:
        super().__init__(p=probability)
        self.channels = channels

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw what is changed, and by how much (called by v2)."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        params["channel_permutation"] = torch.randperm(3) if float(torch.rand(())) < self.channels else None
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Recolour an image; everything else passes (called by v2)."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = as_pixels(inpt)  # (H, W, 3)
        if params["brightness_factor"] is not None:
            pixels = brighten(pixels, params["brightness_factor"])
        if params["contrast_factor"] is not None and params["contrast_before"]:
            pixels = contrast(pixels, params["contrast_factor"])
        if params["saturation_factor"] is not None:
            pixels = saturate(pixels, params["saturation_factor"])
        if params["hue_factor"] is not None:
            pixels = turn_hue(pixels, params["hue_factor"])
        if params["contrast_factor"] is not None and not params["contrast_before"]:
            pixels = contrast(pixels, params["contrast_factor"])
        if params["channel_permutation"] is not None:
            pixels = np.ascontiguousarray(pixels[..., params["channel_permutation"].numpy()])
        return tv_tensors.Image(as_image(pixels))


def brighten(pixels: Pixels, factor: float) -> Pixels:
    """Return pixels ``(H, W, 3)`` times ``factor``."""
    return _look_up(pixels, torch.arange(256) * factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Return pixels ``(H, W, 3)`` whose distance from the mean grey is ``factor`` times what it was."""
    mean = float(np.dot(cv2.mean(pixels)[:3], GREY)) - 0.5  # torchvision rounds each grey value down
    return _look_up(pixels, torch.arange(256) * factor + mean * (1 - factor))


def saturate(pixels: Pixels, factor: float) -> Pixels:
    """Return pixels ``(H, W, 3)`` whose distance from their own grey is ``factor`` times what it was."""
    mixing = np.eye(3) * factor + np.tile(np.array(GREY), (3, 1)) * (1 - factor)  # (3, 3)
    return np.asarray(cv2.transform(pixels, mixing), np.uint8)


def _look_up(pixels: Pixels, values: Tensor) -> Pixels:
    """Return what ``values`` (256,) says of each channel, cut to 0..255."""
    return np.asarray(cv2.LUT(pixels, values.clamp(0, 255).to(torch.uint8).numpy()), np.uint8)
