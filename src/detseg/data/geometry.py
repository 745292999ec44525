"""Resize with jitter and crop in one go, of which torchvision v2 has no fast form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Pixels = NDArray[np.uint8]
"""``(H, W, 3)`` RGB."""


class LabelMask(tv_tensors.Mask):  # type: ignore[misc]  # torchvision has no types
    """A map of class labels: pixels outside the image become ``UNLABELLED``, where other masks get 0."""


UNLABELLED = -1
"""Stands for the map's own ignore index between two steps."""

TRIES = 10
"""Places of a crop that are tried at most, as MMSegmentation does; see ``ResizeAndCrop.draw``."""


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

    @property
    def empty(self) -> bool:
        """Whether nothing of the source lies on the canvas; ``offset`` is beyond it then."""
        axes = zip(self.offset, self.shown, self.canvas, strict=True)
        return any(offset >= canvas or offset + shown <= 0 for offset, shown, canvas in axes)


class Windowed(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Sees images, boxes, masks and maps through the window in ``params["window"]``; subclasses say which it is."""

    fill = 114
    view: Tensor | None = None
    """What is seen of the source where that may end inside the canvas, xyxy ``(1, 4)``; objects end there too."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the window to one image, set of boxes, or mask (called by v2)."""
        window: Window = params["window"]
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(window_image(inpt.as_subclass(Tensor), window, self.fill, self.recolour))
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

    def recolour(self, shown: Tensor) -> Tensor:
        """Change the colours of what is shown of the image, (3, h, w); here it stays as it is."""
        return shown


class ResizeAndCrop(Windowed):
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
        self.zoom = 1.0
        """Factor of every size above; see ``zoomed``."""

    def extra_repr(self) -> str:
        """Return the numbers for ``repr``."""
        return (
            f"size={self.size}, short_side={self.short_side}, long_side={self.long_side}, scale={self.scale}, "
            f"crop={self.crop}"
        )

    def zoomed(self, choice: float | Sequence[int]) -> ResizeAndCrop:
        """Return the step for images of another size.

        Args:
            choice: a factor of every size, of an image that keeps its size too; or the (height, width) in pixels to
                stretch to, in place of every size.

        Raises:
            ValueError: a size or factor that is not positive.
        """
        if not isinstance(choice, int | float):
            return ResizeAndCrop(size=choice, scale=self.scale, fill=self.fill)
        if not choice > 0:
            raise ValueError(f"a factor of the image size must be positive, got {choice}")
        other = copy.copy(self)
        other.zoom = self.zoom * float(choice)
        return other

    def fit(self, size: tuple[int, int], within: tuple[int, int] | None = None) -> tuple[float, float]:
        """Return the (height, width) that an image is resized to before jitter.

        Args:
            size: its height and width.
            within: for a part cut out of an image or one with a margin: height and width of the image itself, into
                which it is fitted, the shape kept, where nothing else is asked for.
        """
        if self.size is not None:
            return self.size[0] * self.zoom, self.size[1] * self.zoom
        factor = 1.0
        if self.short_side is not None:
            factor = self.short_side / min(size)
            if self.long_side is not None:
                factor = min(factor, self.long_side / max(size))
        elif self.long_side is not None:
            factor = self.long_side / max(size)
        elif within is not None:
            factor = min(within[0] / size[0], within[1] / size[1])
        return size[0] * factor * self.zoom, size[1] * factor * self.zoom

    def canvas(self, size: tuple[int, int], within: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the (height, width) of the result, before jitter makes it any smaller; arguments as of ``fit``."""
        crop = self.crop
        height, width = self.fit(size, within) if crop is None else (crop[0] * self.zoom, crop[1] * self.zoom)
        return max(1, round(height)), max(1, round(width))

    def draw(
        self,
        size: tuple[int, int],
        *,
        within: tuple[int, int] | None = None,
        canvas: tuple[int, int] | None = None,
        scale: tuple[float, float] | None = None,
        anchor: tuple[float | None, float | None] = (None, None),
        good: Callable[[Window], bool] | None = None,
    ) -> Window:
        """Draw a window.

        Args:
            size: (height, width) of the image.
            within: see ``fit``.
            canvas: (height, width) of the result, in place of what the sizes say.
            scale: range of the factor, in place of the step's own.
            anchor: where a smaller image lies on the canvas, down and to the right: 0 at the start, 1 at the end,
                ``None`` at random.
            good: says whether a window will do. The place, not the factor, is drawn anew until it does, ``TRIES``
                times in all; the last stays.
        """
        low, high = self.scale if scale is None else scale
        factor = low + (high - low) * float(torch.rand(())) if high > low else low
        fitted = self.fit(size, within)
        sides = [self._side(axis, fitted[axis], factor, canvas) for axis in range(2)]  # (resized, room) of each axis
        for _ in range(TRIES):
            axes = [_place(length, *sides[axis], anchor[axis]) for axis, length in enumerate(size)]
            window = Window(*zip(*axes, strict=True))
            if good is None or window.span == size or good(window):  # a whole image shows the same wherever it lies
                break
        return window

    def _side(self, axis: int, fitted: float, factor: float, canvas: tuple[int, int] | None) -> tuple[int, int]:
        """Return how long one axis of the image becomes, and the room that the canvas has for it, in pixels."""
        resized = max(1, round(fitted * factor))
        if canvas is not None:
            return resized, canvas[axis]
        if self.crop is not None:
            return resized, max(1, round(self.crop[axis] * self.zoom))
        if self.size is not None:
            return resized, max(1, round(fitted))
        return resized, min(resized, max(1, round(fitted)))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window for the one image among the inputs (called by v2)."""
        height, width = next(item.shape[-2:] for item in flat_inputs if isinstance(item, tv_tensors.Image))
        return {"window": self.draw((height, width))}


class Place(Windowed):
    """See everything through one given window, and recolour what is shown of the image before the rest is filled up.

    Args:
        window: what goes where.
        fill: grey value outside the image.
        recolour: a transform of a ``tv_tensors.Image``, or ``None``.
    """

    def __init__(self, *, window: Window, fill: int, recolour: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.window, self.fill, self.change = window, fill, recolour
        (top, left), (height, width) = window.start, window.span
        self.view = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the window (called by v2)."""
        return {"window": self.window}

    def recolour(self, shown: Tensor) -> Tensor:
        """Change the colours of what is shown of the image, (3, h, w)."""
        if self.change is None:
            return shown
        changed: Tensor = self.change(tv_tensors.Image(shown)).as_subclass(Tensor)
        return changed


def window_image(
    image: Tensor, window: Window, fill: int = 114, recolour: Callable[[Tensor], Tensor] = lambda shown: shown
) -> Tensor:
    """Return an image seen through a window.

    Args:
        image: ``(3, H, W)`` uint8.
        window: what goes where.
        fill: grey value outside the image.
        recolour: changes the pixels ``(3, h, w)`` that show, before the rest is filled up.

    Returns:
        ``(3, *canvas)`` uint8.
    """
    if window.empty:
        return _grey(window, fill)
    (top, left), (height, width) = window.start, window.span
    cut = image[:, top : top + height, left : left + width]
    shown = recolour(cut if window.shown == window.span else F.resize_image(cut, list(window.shown), antialias=True))
    if window.shown == window.canvas:
        return shown
    canvas = _grey(window, fill)
    (y, x), (h, w) = window.offset, window.shown
    canvas[:, y : y + h, x : x + w] = shown
    return canvas


def _grey(window: Window, fill: int) -> Tensor:
    """Return a canvas (3, H, W) uint8 of one grey value, rows of pixels in memory."""
    return torch.full((*window.canvas, 3), fill, dtype=torch.uint8).permute(2, 0, 1)


def window_boxes(boxes: Tensor, window: Window) -> Tensor:
    """Return ``boxes`` (N, 4) xyxy in the pixels of the canvas, not clipped."""
    scale = boxes.new_tensor([window.shown[1] / window.span[1], window.shown[0] / window.span[0]] * 2)
    start = boxes.new_tensor([window.start[1], window.start[0]] * 2)
    offset = boxes.new_tensor([window.offset[1], window.offset[0]] * 2)
    return (boxes - start) * scale + offset


def window_mask(mask: Tensor, window: Window, fill: int = 0) -> Tensor:
    """Return ``mask`` (N, H, W) seen through ``window``: the pixel nearest to each centre, ``fill`` outside."""
    if window.empty:
        return mask.new_full((len(mask), *window.canvas), fill)
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


def as_pixels(image: Tensor) -> Pixels:
    """Return an image ``(3, H, W)`` uint8 as ``(H, W, 3)``, without a copy where its pixels lie so; do not write."""
    return np.ascontiguousarray(image.as_subclass(Tensor).permute(1, 2, 0).numpy())


def as_image(pixels: Pixels) -> Tensor:
    """Return ``(H, W, 3)`` uint8 as a tensor ``(3, H, W)`` that shares its memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pair(name: str, value: Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int) or len(value) != 2 or min(value) < 1:
        raise ValueError(f"{name} must be [height, width] in pixels, both at least 1, got {value}")
    return int(value[0]), int(value[1])


def _place(length: int, resized: int, canvas: int, anchor: float | None = None) -> tuple[int, int, int, int, int]:
    """Return (start, span, shown, offset, canvas) along one axis, at a random place where there is room."""
    if resized > canvas:
        span = max(1, round(canvas * length / resized))
        start = int(torch.randint(length - span + 1, ()))
        return start, span, canvas, 0, canvas
    if anchor is not None:
        return 0, length, resized, round(anchor * (canvas - resized)), canvas
    offset = int(torch.randint(canvas - resized + 1, ())) if resized < canvas else 0
    return 0, length, resized, offset, canvas


def _nearest(span: int, shown: int) -> Tensor:
    """Return the source index under the centre of each of ``shown`` pixels."""
    return ((torch.arange(shown) * 2 + 1) * span) // (2 * shown)
