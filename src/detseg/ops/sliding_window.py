"""Sliding windows: boxes of a few sizes and shapes on a regular grid, whatever the image shows.

The search of `"Histograms of Oriented Gradients for Human Detection" <https://doi.org/10.1109/CVPR.2005.177>`_ and of
the detectors before region proposals. There windows of one shape move over a pyramid of resized images; here the image
stays and the windows have several sizes, which gives the same boxes.

Letters: H, W the image, N windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detseg.ops.box_order import chance_order

VERSION = 1
"""Raised whenever other windows come out of the same parameters."""


def count_windows(height: int, width: int) -> int:
    """Return the number of all boxes at whole pixels in an image: ``H (H + 1) / 2 * W (W + 1) / 2``.

    A box has two different ones of the H + 1 lines between rows and two of the W + 1 lines between columns.

    Args:
        height: H in pixels, at least 0.
        width: W in pixels, at least 0.

    Raises:
        ValueError: a side is negative.
    """
    if height < 0 or width < 0:
        raise ValueError(f"count_windows: an image of {height} x {width} pixels does not exist")
    return math.comb(height + 1, 2) * math.comb(width + 1, 2)


class SlidingWindow:
    """Windows on a grid, in an order that looks random, so that the first ones are a fair sample of all.

    A window of scale s and ratio r is ``s / sqrt(r)`` wide and ``s * sqrt(r)`` high, rounded to whole pixels. Its steps
    are a share of its own sides. The grid is centred, so that what is left over is shared by both borders; a window
    that is larger than the image in one direction is cut to it there, and one that is larger in both is left out, as
    are repetitions. In an image that is smaller than every window N is 0.

    Args:
        scales: roots of the windows' areas, in pixels.
        ratios: height over width.
        stride: step between neighbours, as a share of the window's width and height, in (0, 1].
        limit: windows at most; ``None``: all.

    Raises:
        ValueError: no scale or ratio, or a number outside its range.
    """

    def __init__(
        self,
        *,
        scales: Sequence[float] = (16, 24, 36, 54, 80, 120, 180, 270),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        stride: float = 0.25,
        limit: int | None = None,
    ) -> None:
        self.scales, self.ratios = tuple(map(float, scales)), tuple(map(float, ratios))
        if not self.scales or not self.ratios or min(*self.scales, *self.ratios) <= 0:
            raise ValueError(f"SlidingWindow: scales={list(scales)}, ratios={list(ratios)}; give some, all above 0")
        if not 0 < stride <= 1 or (limit is not None and limit < 1):
            raise ValueError(f"SlidingWindow: stride={stride} must lie in (0, 1] and limit={limit} be at least 1")
        self.stride, self.limit = float(stride), limit

    @property
    def key(self) -> str:
        """Name, version and every parameter."""
        return f"{self!r} version {VERSION}"

    def __repr__(self) -> str:
        return (
            f"SlidingWindow(scales={list(self.scales)}, ratios={list(self.ratios)}, stride={self.stride}, "
            f"limit={self.limit})"
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Return windows ``(N, 4)`` float32 xyxy, see ``Proposer``; of the image the size alone is looked at.

        Args:
            image: ``(3, H, W)``.
        """
        return self.windows(image.shape[-2], image.shape[-1])

    def windows(self, height: int, width: int) -> Tensor:
        """Return the windows ``(N, 4)`` float32 xyxy of an image of ``height`` x ``width`` pixels."""
        grids = [np.zeros((0, 4), dtype=np.int64)]
        for scale in self.scales:
            for ratio in self.ratios:
                w, h = max(1, round(scale / math.sqrt(ratio))), max(1, round(scale * math.sqrt(ratio)))
                if w <= width or h <= height:
                    grids.append(_grid((height, width), (min(h, height), min(w, width)), self.stride))
        boxes = np.unique(np.concatenate(grids), axis=0)  # (N, 4)
        return torch.from_numpy(boxes[chance_order(boxes)[: self.limit]].astype(np.float32))


def _grid(size: tuple[int, int], window: tuple[int, int], stride: float) -> NDArray[np.int64]:
    """Return ``(N, 4)`` xyxy of one window (h, w), which fits in, all over an image (h, w)."""
    rows, columns = (_starts(size[axis], window[axis], stride) for axis in (0, 1))
    left, top = (axis.ravel() for axis in np.meshgrid(columns, rows))  # (N,) each
    return np.stack([left, top, left + window[1], top + window[0]], axis=1)


def _starts(length: int, window: int, stride: float) -> NDArray[np.int64]:
    """Return where windows begin along one axis, ascending."""
    step = max(1, round(window * stride))
    count = (length - window) // step
    return np.arange(count + 1) * step + (length - window - count * step) // 2
