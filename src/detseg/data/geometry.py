"""The two steps that torchvision v2 has no fast form of: resize with jitter and crop in one go, and a quick hue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class LabelMask(tv_tensors.Mask):  # type: ignore[misc]  # torchvision has no types
    """A map of class labels: pixels outside the image become ``UNLABELLED``, where other masks get 0."""


UNLABELLED = -1
"""Stands for the map's own ignore index between two steps."""


class Window(NamedTuple):
    """What part of the source goes where, all in pixels: (top, left) and (height, width) pairs.

    Attributes:
        start, span: the part of the source that is cut out.
        shown: its size after resizing.
        offset: where it lies on the canvas.
        canvas: the size of the result.
    """

    start: tuple[int, int]
    span: tuple[int, int]
    shown: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]


class ResizeAndCrop(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Resize, scale at random and cut or fill to a canvas, touching only source pixels that end up on it.

    Large scale jitter (Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method", section 3) is
    this step with ``scale=(0.1, 2.0)``. Images are resized bilinearly with antialiasing, masks and maps take the
    nearest pixel. Args: see :class:`detseg.data.transforms.Recipe`.
    """

    def __init__(
        self,
        *,
        size: Sequence[int] | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scale: Sequence[float] = (1.0, 1.0),
        crop: Sequence[int] | None = None,
        fill: int = 114,
    ) -> None:
        super().__init__()
        self.size, self.crop = _pair("size", size), _pair("crop", crop)
        if self.size is not None and (short_side is not None or long_side is not None):
            raise ValueError(
                f"size={self.size} stretches to a fixed size, short_side={short_side} and long_side={long_side} keep "
                "the shape; give one or the other"
            )
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (lowest, highest) with 0 < lowest <= highest, got {tuple(scale)}")
        self.short_side, self.long_side, self.fill = short_side, long_side, fill
        self.scale = (float(scale[0]), float(scale[1]))

    def extra_repr(self) -> str:
        """Return the numbers for ``repr``."""
        return (
            f"size={self.size}, short_side={self.short_side}, long_side={self.long_side}, scale={self.scale}, "
            f"crop={self.crop}"
        )

    def fit(self, size: tuple[int, int]) -> tuple[float, float]:
        """Return the (height, width) that an image of (height, width) ``size`` is resized to before jitter."""
        if self.size is not None:
            return float(self.size[0]), float(self.size[1])
        factor = 1.0
        if self.short_side is not None:
            factor = self.short_side / min(size)
            if self.long_side is not None:
                factor = min(factor, self.long_side / max(size))
        elif self.long_side is not None:
            factor = self.long_side / max(size)
        return size[0] * factor, size[1] * factor

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window for the one image among the inputs (called by v2)."""
        height, width = next(item.shape[-2:] for item in flat_inputs if isinstance(item, tv_tensors.Image))
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(())) if high > low else low
        fitted = self.fit((height, width))
        axes = []
        for axis, length in enumerate((height, width)):
            resized = max(1, round(fitted[axis] * factor))
            if self.crop is not None:
                canvas = self.crop[axis]
            elif self.size is not None:
                canvas = self.size[axis]
            else:
                canvas = min(resized, max(1, round(fitted[axis])))
            axes.append(_place(length, resized, canvas))
        return {"window": Window(*zip(*axes, strict=True))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the window to one image, set of boxes, or mask (called by v2)."""
        window: Window = params["window"]
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(window_image(inpt.as_subclass(Tensor), window, self.fill))
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return tv_tensors.BoundingBoxes(
                window_boxes(inpt.as_subclass(Tensor), window),
                format="XYXY",
                canvas_size=window.canvas,
                clamping_mode=None,
            )
        if isinstance(inpt, tv_tensors.Mask):
            fill = UNLABELLED if isinstance(inpt, LabelMask) else 0
            return tv_tensors.wrap(window_mask(inpt.as_subclass(Tensor), window, fill), like=inpt)
        return inpt


def window_image(image: Tensor, window: Window, fill: int = 114) -> Tensor:
    """Return ``image`` (3, H, W) uint8 seen through ``window``, (3, *canvas); ``fill`` is the grey value outside."""
    (top, left), (height, width) = window.start, window.span
    cut = image[:, top : top + height, left : left + width]
    shown = cut if window.shown == window.span else F.resize_image(cut, list(window.shown), antialias=True)
    if window.shown == window.canvas:
        return shown
    canvas = torch.full((*window.canvas, 3), fill, dtype=image.dtype).permute(2, 0, 1)  # rows of pixels in memory
    (y, x), (h, w) = window.offset, window.shown
    canvas[:, y : y + h, x : x + w] = shown
    return canvas


def window_boxes(boxes: Tensor, window: Window) -> Tensor:
    """Return ``boxes`` (N, 4) xyxy in the pixels of the canvas, not clipped."""
    scale = boxes.new_tensor([window.shown[1] / window.span[1], window.shown[0] / window.span[0]]).repeat(2)
    start = boxes.new_tensor([window.start[1], window.start[0]]).repeat(2)
    offset = boxes.new_tensor([window.offset[1], window.offset[0]]).repeat(2)
    return (boxes - start) * scale + offset


def window_mask(mask: Tensor, window: Window, fill: int = 0) -> Tensor:
    """Return ``mask`` (N, H, W) seen through ``window``: the pixel nearest to each centre, ``fill`` outside."""
    (top, left), (height, width) = window.start, window.span
    shown = mask[:, top : top + height, left : left + width]
    if window.shown != window.span:
        shown = shown.index_select(1, _nearest(height, window.shown[0])).index_select(
            2, _nearest(width, window.shown[1])
        )
    if window.shown == window.canvas:
        return shown
    canvas = mask.new_full((len(mask), *window.canvas), fill)
    (y, x), (h, w) = window.offset, window.shown
    canvas[:, y : y + h, x : x + w] = shown
    return canvas


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
        pixels = np.ascontiguousarray(inpt.as_subclass(Tensor).permute(1, 2, 0).numpy())  # (H, W, 3)
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(round(params["turn"] * 256) % 256)  # wraps round
        return tv_tensors.Image(torch.from_numpy(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)).permute(2, 0, 1))


def _pair(name: str, value: Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int) or len(value) != 2 or min(value) < 1:
        raise ValueError(f"{name} must be [height, width] in pixels, both at least 1, got {value}")
    return int(value[0]), int(value[1])


def _place(length: int, resized: int, canvas: int) -> tuple[int, int, int, int, int]:
    """Return (start, span, shown, offset, canvas) along one axis, at a random place where there is room."""
    if resized > canvas:
        span = max(1, round(canvas * length / resized))
        start = int(torch.randint(length - span + 1, ()))
        return start, span, canvas, 0, canvas
    offset = int(torch.randint(canvas - resized + 1, ())) if resized < canvas else 0
    return 0, length, resized, offset, canvas


def _nearest(span: int, shown: int) -> Tensor:
    """Return the source index under the centre of each of ``shown`` pixels."""
    return ((torch.arange(shown) * 2 + 1) * span) // (2 * shown)
