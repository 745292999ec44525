"""SSD's zoom out and IoU crop (Liu et al. 2016, arXiv:1512.02325, sections 2.2 and 3.6), as frames around the source.

A frame is a rectangle in the pixels of the source image: smaller than it, or reaching beyond it. Nothing is cut or
filled until :func:`through` has put frame and resizing together, so that a margin of four times the image costs
nothing, and each pixel is resampled once. torchvision's ``RandomZoomOut`` and ``RandomIoUCrop`` draw the same frames,
but the first makes the large image, and the second takes proposals for objects, tries frames one by one, and never
ends on an image without objects unless leaving it whole is among the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detseg.data.geometry import Window

TRIALS = 40
"""Patches tried for one demand, as in torchvision; 50 in the paper's code."""
ROUNDS = 10
"""Demands tried before an image is left whole."""
SCALE = (0.3, 1.0)
"""Sides of a patch relative to the image's: the released code's range; the paper says 0.1 to 1."""
ASPECT = (0.5, 2.0)
"""Width over height of a patch (section 2.2)."""


class Frame(NamedTuple):
    """A rectangle in the pixels of an image; (top, left) may be negative, and it may end beyond the image."""

    start: tuple[int, int]
    size: tuple[int, int]


def zoom_out(frame: Frame, largest: float) -> Frame:
    """Return a frame of 1 to ``largest`` times the sides, around ``frame`` at a random place."""
    factor = 1 + (largest - 1) * float(torch.rand(()))
    sides = [int(side * factor) for side in frame.size]
    places = torch.rand(2).flip(0).tolist()  # torchvision draws the one along the width first
    margins = [int((after - side) * place) for after, side, place in zip(sides, frame.size, places, strict=True)]
    return Frame((frame.start[0] - margins[0], frame.start[1] - margins[1]), (sides[0], sides[1]))


def iou_crop(frame: Frame, boxes: Tensor, overlaps: Sequence[float]) -> tuple[Frame, bool]:
    """Draw a patch of ``frame`` that has the demanded IoU with some object, and the centre of that object.

    Args:
        frame: what is cut from.
        boxes: ``(N, 4)`` xyxy in the image's pixels: objects that count for the demand. Without any, no patch has to
            meet one.
        overlaps: lowest IoU, one of which is demanded at random; 1 and above leaves the frame as it is.

    Returns:
        The patch, and whether one was cut: an object is then to be kept if its centre lies in it (``centred``).
    """
    for _ in range(ROUNDS):
        demand = float(overlaps[int(torch.randint(len(overlaps), ()))])
        if demand >= 1:
            return frame, False
        patches = _patches(frame)  # (T, 4)
        good = _meeting(patches, boxes, demand) if len(boxes) else torch.ones(len(patches), dtype=torch.bool)
        if bool(good.any()):
            left, top, right, bottom = (int(side) for side in patches[int(good.nonzero()[0, 0])].tolist())
            return Frame((top, left), (bottom - top, right - left)), True
    return frame, False


def centred(boxes: Tensor, frame: Frame) -> Tensor:
    """Return which boxes ``(N, 4)`` have their centre inside the frame, ``(N,)`` bool."""
    (top, left), (height, width) = frame
    edges = boxes.new_tensor([[left, top, left + width, top + height]])  # (1, 4)
    return _centres_in(boxes, edges)[0]


def through(window: Window, frame: Frame, size: tuple[int, int]) -> Window:
    """Return the window that shows of an image what ``window`` shows of a frame of it.

    Args:
        window: start and span count from the frame's corner.
        frame: in the pixels of the image.
        size: (height, width) of the image.
    """
    axes = [
        _through(size[axis], frame.start[axis] + window.start[axis], window.span[axis], window.shown[axis],
                 window.offset[axis], window.canvas[axis])
        for axis in range(2)
    ]  # fmt: skip
    start, span, shown, offset = zip(*axes, strict=True)
    return Window(start=start, span=span, shown=shown, offset=offset, canvas=window.canvas)


def _through(length: int, start: int, span: int, shown: int, offset: int, canvas: int) -> tuple[int, int, int, int]:
    """Return (start, span, shown, offset) along one axis of an image of ``length``, cut to what the image has."""
    scale = shown / span
    low, high = max(0, start), min(length, start + span)
    if low >= high:  # nothing in sight: all of it lies beyond the canvas
        pixels = max(1, round(length * scale))
        return 0, length, pixels, canvas if start < 0 else -pixels
    first = min(round((low - start) * scale), shown - 1)
    last = max(first + 1, min(shown, round((high - start) * scale)))
    return low, high - low, last - first, offset + first


def _patches(frame: Frame) -> Tensor:
    """Draw ``TRIALS`` patches (T, 4) xyxy within the frame and return those of a fitting shape, in random order."""
    (top, left), (height, width) = frame
    draws = torch.rand(TRIALS, 4)
    sides = torch.tensor([width, height]) * (SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, :2])  # (T, 2)
    sides = sides.floor().clamp(min=1)
    corner = ((torch.tensor([width, height]) - sides) * draws[:, 2:]).floor() + torch.tensor([left, top])  # (T, 2)
    aspect = sides[:, 0] / sides[:, 1]  # (T,)
    return torch.cat([corner, corner + sides], dim=1)[(aspect >= ASPECT[0]) & (aspect <= ASPECT[1])]


def _meeting(patches: Tensor, boxes: Tensor, demand: float) -> Tensor:
    """Return which patches (T, 4) hold the centre of some box (N, 4) with which they have the demanded IoU, (T,)."""
    inside = _centres_in(boxes, patches)  # (T, N)
    ious: Tensor = box_iou(patches, boxes)  # (T, N)
    return (inside & (ious >= demand)).any(dim=1)


def _centres_in(boxes: Tensor, patches: Tensor) -> Tensor:
    """Return whether the centre of each box (N, 4) lies inside each patch (T, 4), (T, N)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N, 2)
    return ((centres > patches[:, None, :2]) & (centres < patches[:, None, 2:])).all(dim=-1)
