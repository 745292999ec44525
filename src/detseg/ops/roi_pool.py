"""RoIPool: `"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_, section 2.1.

The numbers are torchvision's ``roi_pool``, bit for bit where the map is finite. It is used where a gradient is wanted,
on a GPU, and where regions are few or their cells large. Elsewhere, as maps are small, there are fewer windows that a
cell can be than there are cells: their maxima are made once, by running maxima, and each cell of each region is a row
of that table.

Letters: B images, C channels, H and W cells of the map, R regions, P cells of a region's side, T and S the height of
the tallest and the width of the widest window, N = B * H * W.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor


def roi_pool(feature: Tensor, regions: Tensor, scale: float, *, output_size: int) -> Tensor:
    """Return the maximum of every cell of every region ``(R, C, P, P)`` float32, 0 for a cell outside the map.

    Args:
        feature: ``(B, C, H, W)`` float32.
        regions: ``(R, 5)`` float32 image index and xyxy pixels.
        scale: cells of the map per pixel, the inverse of its stride.
        output_size: P.
    """
    learning = torch.is_grad_enabled() and feature.requires_grad
    if not learning and feature.device.type == "cpu" and len(regions):
        windows = _Windows(feature, regions, output_size, scale)
        if windows.worthwhile:
            return windows.pool(feature)
    pooled: Tensor = torchvision.ops.roi_pool(feature, regions, output_size, scale)
    return pooled


class _Windows:
    """The window of the map ``(B, C, H, W)`` that each cell of each region is the maximum of."""

    def __init__(self, feature: Tensor, regions: Tensor, output_size: int, scale: float) -> None:
        height, width = feature.shape[2:]
        image, x0, y0, x1, y1 = regions.unbind(1)  # (R,) each
        self.image = image.long()
        self.top, self.tall = _intervals(y0 * scale, y1 * scale, height, output_size)  # (R, P) each
        self.left, self.wide = _intervals(x0 * scale, x1 * scale, width, output_size)  # (R, P) each
        self.tallest, self.widest = max(1, int(self.tall.max())), max(1, int(self.wide.max()))
        entries = self.tallest * self.widest * len(feature) * height * width
        self.worthwhile = entries <= len(regions) * output_size**2  # a table no larger than the result

    def pool(self, feature: Tensor) -> Tensor:
        """Return ``(R, C, P, P)``."""
        count, channels, height, width = feature.shape
        cells = count * height * width  # N
        table = _maxima(feature, self.tallest, self.widest)  # (T * S * N + 1, C)
        row = (self.tall - 1) * (self.widest * cells) + self.top * width  # (R, P)
        row = row + (self.image * (height * width))[:, None]
        column = (self.wide - 1) * cells + self.left  # (R, P)
        empty = (self.tall <= 0)[:, :, None] | (self.wide <= 0)[:, None, :]  # (R, P, P)
        index = (row[:, :, None] + column[:, None, :]).masked_fill(empty, len(table) - 1)  # (R, P, P)
        shape = (len(index), *index.shape[1:], channels)
        return table.index_select(0, index.flatten()).view(shape).permute(0, 3, 1, 2)  # (R, C, P, P)


def _intervals(low: Tensor, high: Tensor, length: int, output_size: int) -> tuple[Tensor, Tensor]:
    """Return first cell and number of cells ``(R, P)`` int64 of what each output cell covers of one axis.

    The ends ``(R,)`` are rounded to whole cells, both of which belong to the region; the output cells overlap where
    the region's cells cannot be shared out evenly. Without a cell on the map the number is at most 0.
    """
    start, end = _round(low), _round(high)  # (R,)
    step = (end - start + 1).clamp(min=1)[:, None] / output_size  # (R, 1) float32
    place = torch.arange(output_size + 1, dtype=torch.float32)  # (P + 1,)
    first = (place[:-1] * step).floor() + start[:, None]  # (R, P)
    last = (place[1:] * step).ceil() + start[:, None]  # (R, P)
    first, last = first.clamp(0, length), last.clamp(0, length)  # (R, P)
    return first.long(), (last - first).long()


def _round(values: Tensor) -> Tensor:
    """Return float32 values rounded as C does, halves away from zero; float64 inside, lest 0.49999997 become 1."""
    values = values.double()
    return (values.abs() + 0.5).floor().copysign(values).float()


def _maxima(feature: Tensor, tallest: int, widest: int) -> Tensor:
    """Return the maximum of every window ``(T * S * N + 1, C)``, by height, width, image and place; the last row is 0.

    Windows that leave the map are never read, and hold anything.
    """
    count, channels, height, width = feature.shape
    table = feature.new_empty(tallest * widest * count * height * width + 1, channels)
    table[-1] = 0
    windows = table[:-1].view(tallest, widest, count, height, width, channels)
    windows[0, 0] = feature.permute(0, 2, 3, 1)
    single = windows[0, 0]  # (B, H, W, C)
    for more in range(1, widest):
        rest = width - more
        torch.maximum(windows[0, more - 1, :, :, :rest], single[:, :, more:], out=windows[0, more, :, :, :rest])
    flat = windows[0]  # (S, B, H, W, C)
    for more in range(1, tallest):
        rest = height - more
        torch.maximum(windows[more - 1, :, :, :rest], flat[:, :, more:], out=windows[more, :, :, :rest])
    return table
