"""RoIAlign over the levels of a pyramid at once: `"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_, section 3.

The numbers are those of torchvision's ``roi_align`` with ``aligned=False``. On a GPU, and for an adaptive number of
samples, it is used. On a CPU it took 40 % of a training step (its backward runs on one core, channel by channel), so
there each output cell is a weighted sum of rows of one table, cells x channels: measured 3 to 5 times as fast forward
and backward (1,024 regions, 64 and 256 channels, torch 2.14).

Letters: R regions, C channels, P cells of a region's side, S samples per cell and axis, T = 4 S * S rows that a cell
sums, N cells of all levels and images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK = 1024  # regions per pass where no gradient is kept; bounds memory


def pyramid_roi_align(
    features: Sequence[Tensor],
    regions: Tensor,
    level: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    """Return the features of each region ``(R, C, P, P)`` float32, read from its level.

    Args:
        features: per level ``(B, C, H, W)``.
        regions: ``(R, 5)`` image index and xyxy pixels.
        level: ``(R,)`` int64, the level that each region reads.
        strides: pixels per cell of each level.
        output_size: P.
        sampling_ratio: S; 0 takes as many samples as the region has pixels.
    """
    # Coordinates in half precision are off by whole pixels, and torchvision wants one type for both inputs.
    features, regions = [feature.float() for feature in features], regions.float()
    if sampling_ratio <= 0 or regions.device.type != "cpu":
        pool = partial(_roi_align, output_size=output_size, sampling_ratio=sampling_ratio)
        return by_level(pool, features, regions, level, strides)
    tables = [feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features]  # per level (B * H * W, C)
    table = tables[0] if len(tables) == 1 else torch.cat(tables)  # (N, C)
    step = max(1, len(regions)) if table.requires_grad and torch.is_grad_enabled() else _CHUNK
    parts = [
        _Bags.apply(table, *_bags(features, some, where, strides, output_size, sampling_ratio))  # (r * P * P, C)
        for some, where in zip(torch.split(regions, step), torch.split(level, step), strict=True)
    ]
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts)  # (R * P * P, C)
    return pooled.view(len(regions), output_size, output_size, table.shape[1]).permute(0, 3, 1, 2)  # (R, C, P, P)


def by_level(
    pool: Callable[[Tensor, Tensor, float], Tensor],
    features: Sequence[Tensor],
    regions: Tensor,
    level: Tensor,
    strides: Sequence[int],
) -> Tensor:
    """Return the features of each region ``(R, C, P, P)``, in the order of the regions.

    Args:
        pool: takes one level ``(B, C, H, W)``, its regions ``(R_l, 5)`` and its cells per pixel.
        features: per level ``(B, C, H, W)``.
        regions: ``(R, 5)`` image index and xyxy pixels.
        level: ``(R,)`` int64, the level that each region reads.
        strides: pixels per cell of each level.
    """
    rows = [(level == index).nonzero().flatten() for index in range(len(features))]  # per level (R_l,)
    pooled = [
        pool(feature, regions[row], 1.0 / stride) for feature, row, stride in zip(features, rows, strides, strict=True)
    ]
    if len(pooled) == 1:
        return pooled[0]
    # One reordered copy: assigning level by level into zeros makes autograd copy the whole result each time.
    return torch.cat(pooled).index_select(0, torch.cat(rows).argsort())  # (R, C, P, P)


def _roi_align(feature: Tensor, regions: Tensor, scale: float, *, output_size: int, sampling_ratio: int) -> Tensor:
    pooled: Tensor = torchvision.ops.roi_align(feature, regions, output_size, scale, sampling_ratio)
    return pooled


def _bags(
    features: Sequence[Tensor],
    regions: Tensor,
    level: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Return the rows of the table that each output cell sums ``(R * P * P, T)``, and their weights."""
    height = torch.tensor([feature.shape[2] for feature in features])[level]  # (R,)
    width = torch.tensor([feature.shape[3] for feature in features])[level]  # (R,)
    cells = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
    first = (torch.tensor(cells).cumsum(0) - torch.tensor(cells))[level]  # (R,) where the level begins
    first = first + regions[:, 0].long() * height * width  # (R,) and the image in it
    x0, y0, x1, y1 = (regions[:, 1:] / torch.tensor(strides)[level, None]).unbind(1)  # (R,) in cells
    row, row_weight = _taps(y0, y1, height, output_size, sampling_ratio)  # (R, P, 2 S) each
    column, column_weight = _taps(x0, x1, width, output_size, sampling_ratio)  # (R, P, 2 S) each
    start = first[:, None, None] + row * width[:, None, None]  # (R, P, 2 S)
    index = start[:, :, None, :, None] + column[:, None, :, None, :]  # (R, P, P, 2 S, 2 S)
    weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]  # (R, P, P, 2 S, 2 S)
    return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def _taps(low: Tensor, high: Tensor, length: Tensor, output_size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return, along one axis, the cells that each output cell reads and the weight of each, ``(R, P, 2 S)``."""
    side = (high - low).clamp(min=1)[:, None] / output_size  # (R, 1) of an output cell; a region has at least 1 cell
    offset = (torch.arange(output_size * samples) + 0.5) / samples  # (P * S,) in output cells
    place = low[:, None] + offset * side  # (R, P * S)
    inside = (place >= -1) & (place <= length[:, None])  # (R, P * S)
    place, last = place.clamp(min=0), (length - 1)[:, None]
    before = torch.minimum(place.long(), last).clamp(min=0)  # (R, P * S)
    after = torch.minimum(before + 1, last)  # (R, P * S)
    share = torch.where(before < last, place - before, 0.0)  # (R, P * S) of the later cell
    weight = torch.stack([1 - share, share], dim=-1) * (inside / samples)[..., None]  # (R, P * S, 2)
    cell = torch.stack([before, after], dim=-1)  # (R, P * S, 2)
    shape = (len(low), output_size, samples * 2)
    return cell.view(shape), weight.view(shape)


class _Bags(torch.autograd.Function):
    """Weighted sums of a table's rows. The gradient sums the other way round, by the same kernel.

    PyTorch's own gradient of ``embedding_bag`` takes twice as long (measured), since it adds row by row.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Return ``(n, C)`` from the table ``(N, C)``, and rows and weights ``(n, T)``."""
        ctx.save_for_backward(index, weight)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the table ``(N, C)``."""
        index, weight = ctx.saved_tensors
        sorted_index, order = index.flatten().sort(stable=True)  # (R * P * P * T,)
        offsets = torch.searchsorted(sorted_index, torch.arange(ctx.rows))  # (N,)
        source = order.div(index.shape[1], rounding_mode="floor")  # the output cell of each entry
        weights = weight.flatten()[order]
        table = F.embedding_bag(source, gradient.contiguous(), offsets, per_sample_weights=weights, mode="sum")
        return table, None, None
