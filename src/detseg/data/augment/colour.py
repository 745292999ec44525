"""Changes of colour, drawn as torchvision draws them, each step with tables and OpenCV on 8-bit pixels.

They differ from torchvision's by rounding and take a fifth of the time; the hue has 256 steps.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from detseg.data.geometry import Pixels, as_image, as_pixels

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue, as torchvision has them."""


class ColourJitter(v2.ColorJitter):  # type: ignore[misc]  # torchvision has no types
    """Change brightness, contrast and saturation by factors from ``[1 - x, 1 + x]``, in an order drawn at random.

    Args:
        brightness, contrast, saturation: x, at least 0; 0 leaves the step out.

    Raises:
        ValueError: one of them is negative.
    """

    def __init__(self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        super().__init__(brightness, contrast, saturation)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Recolour an image; everything else passes (called by v2)."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = as_pixels(inpt)  # (H, W, 3)
        steps = [
            (brighten, params["brightness_factor"]),
            (contrast, params["contrast_factor"]),
            (saturate, params["saturation_factor"]),
            (turn_hue, params["hue_factor"]),  # None: HueShift does that
        ]
        for number in params["fn_idx"].tolist():
            change, factor = steps[number]
            if factor is not None:
                pixels = change(pixels, factor)
        return tv_tensors.Image(as_image(pixels))


class HueShift(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Turn the hue by up to ``amount`` of the full circle; 20 times as fast as ``v2.ColorJitter(hue=...)``.

    The circle has 256 steps (OpenCV's 8-bit HSV), so small colour differences are rounded.

    Raises:
        ValueError: ``amount`` is outside 0 to 0.5.
    """

    def __init__(self, amount: float) -> None:
        super().__init__()
        if not 0 <= amount <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5] of the full circle, got {amount}")
        self.amount = amount

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the turn (called by v2)."""
        return {"turn": (2 * float(torch.rand(())) - 1) * self.amount}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn the hue of an image; everything else passes (called by v2)."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return tv_tensors.Image(as_image(turn_hue(as_pixels(inpt), params["turn"])))


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]  # torchvision has no types
    """SSD's photometric distortion (Liu et al. 2016, arXiv:1512.02325, section 2.2; Howard 2013, arXiv:1312.5402).

    Changes brightness, contrast (before or after the next two), saturation, hue and the order of the channels, as
    torchvision's ``RandomPhotometricDistort`` does.

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


def turn_hue(pixels: Pixels, turn: float) -> Pixels:
    """Return RGB ``(H, W, 3)`` uint8 with its hue turned by ``turn`` of the full circle, in steps of 1/256."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps round
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8)


def _look_up(pixels: Pixels, values: Tensor) -> Pixels:
    """Return what ``values`` (256,) says of each channel, cut to 0..255."""
    return np.asarray(cv2.LUT(pixels, values.clamp(0, 255).to(torch.uint8).numpy()), np.uint8)
