"""Reference boxes repeated over the cells of a pyramid, and the windows of cells that a box can reach.

Dense detectors compare every ground-truth box with every reference box. Nearly all of those pairs are far apart, so
`targets/points.py` and `targets/sparse.py` enumerate only the window of cells that a box can reach on each level.
Everything here works on flat arrays over all boxes of a batch; no loop runs over boxes or images.

Letters: B images, G boxes of all images, N references of one image, S shapes (reference boxes of one cell, over all
levels), P (box, shape) pairs, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Spacing = tuple[float, float]
"""Pixels between neighbouring cells, (vertical, horizontal)."""


class Shapes(NamedTuple):
    """One row per shape of a lattice, all ``(S,)`` but ``base``.

    Attributes:
        base: ``(S, 4)`` xyxy pixels relative to the point of a cell.
        stride_y: pixels between rows of cells.
        stride_x: pixels between columns of cells.
        rows: cells in a column of the level's grid.
        cols: cells in a row of the level's grid.
        first: the index of this shape's reference in the first cell of its level, among the N of an image.
        step: how many shapes a cell of the level has, thus the step of the index from one cell to the next.
        level: the number of the level.
    """

    base: Tensor
    stride_y: Tensor
    stride_x: Tensor
    rows: Tensor
    cols: Tensor
    first: Tensor
    step: Tensor
    level: Tensor


class References(Protocol):
    """Anything that lays reference boxes over a pyramid, such as an ``AnchorGenerator``."""

    def strides(
        self, image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], nominal: Sequence[int]
    ) -> list[Spacing]:
        """Return how far the cells of each level lie apart in pixels, vertically and horizontally.

        Args:
            image_size: (height, width) of the padded images.
            feature_sizes: (H, W) of each level.
            nominal: the backbone's strides. Where a side is no multiple of one, its level is rounded, and side / cells
                is another number.
        """
        ...

    def __call__(
        self, feature_sizes: Sequence[tuple[int, int]], strides: Sequence[Spacing], device: torch.device | str
    ) -> list[Tensor]:
        """Return ``(H * W * A, 4)`` xyxy pixels per level, by row, column, shape; cells are ``strides`` apart."""
        ...

    def __hash__(self) -> int:
        """Grids are kept per object, so equal generators may be two."""
        ...


@dataclass(frozen=True, eq=False)
class Lattice:
    """The reference boxes of one image: on every level the shapes of one cell, shifted to the others.

    The order is torchvision's: by level, row, column, shape. The cell (i, j) is shifted by (j * stride, i * stride).

    Attributes:
        boxes: ``(N, 4)`` xyxy pixels.
        counts: how many of them lie on each level.
        shapes: the table of the shapes.
    """

    boxes: Tensor
    counts: list[int]
    shapes: Shapes

    @property
    def total(self) -> int:
        """The number N of references of one image."""
        return len(self.boxes)


def build_lattice(
    references: References,
    feature_sizes: tuple[tuple[int, int], ...],
    strides: tuple[Spacing, ...],
    device: torch.device | str,
) -> Lattice:
    """Return the lattice of one image size; it is built once and shared, so never change its tensors in place.

    Args:
        references: lays the boxes.
        feature_sizes: (rows, columns) of each level.
        strides: (y, x) pixels between the cells of each level.
        device: where the boxes shall live.
    """
    build = _build.__wrapped__ if torch.compiler.is_compiling() else _build  # an export's tensors hold no numbers
    return build(references, feature_sizes, strides, device)


@lru_cache(maxsize=64)
def _build(
    references: References,
    feature_sizes: tuple[tuple[int, int], ...],
    strides: tuple[Spacing, ...],
    device: torch.device | str,
) -> Lattice:
    # A tensor born in inference mode may not be saved for backward, and this one outlives the mode.
    with torch.inference_mode(False), torch.no_grad():
        levels = references(feature_sizes, strides, device)  # L x (H * W * A, 4)
        bases = references([(1, 1)] * len(strides), strides, device)  # L x (A, 4)
        rows, first = [], 0
        for level, ((h, w), (sy, sx), base) in enumerate(zip(feature_sizes, strides, bases, strict=True)):
            rows += [(sy, sx, h, w, first + a, len(base), level) for a in range(len(base))]
            first += h * w * len(base)
        columns = [torch.tensor(column, device=device) for column in zip(*rows, strict=True)]  # 7 x (S,)
        return Lattice(torch.cat(levels), [len(level) for level in levels], Shapes(torch.cat(bases), *columns))


def expand_ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """List the integers of many ranges at once.

    Args:
        first: ``(R,)`` int64, the first integer of each range.
        last: ``(R,)`` int64, the last one, included; a range with ``last < first`` is empty.

    Returns:
        ``(C,)`` the range that each integer belongs to, and ``(C,)`` the integers, in order of the ranges.
    """
    counts = (last - first + 1).clamp(min=0)  # (R,)
    owner = torch.repeat_interleave(counts)  # (C,)
    start = counts.cumsum(0) - counts  # (R,)
    # index_select, for it is several times as fast as indexing by a tensor
    value = torch.arange(len(owner), device=first.device).sub_((start - first).index_select(0, owner))  # (C,)
    return owner, value


def within(first: Tensor, last: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and last cell as int64, cut to the grid; the window is empty where none of it lies there.

    Cut as floats, since a float beyond 2^63, from a box far outside, has no defined integer.

    Args:
        first: ``(P, 2)`` whole float32.
        last: ``(P, 2)`` whole float32, included.
        limit: ``(P, 2)`` int64, the cells of the grid.
    """
    return torch.minimum(first.clamp(min=0), limit).long(), torch.minimum(last, limit - 1).clamp(min=-1).long()


class Windows(NamedTuple):
    """The cells of many windows, kept separable: a candidate is one row and one column of the same window.

    Attributes:
        row_owner: ``(Pr,)`` the window of each row entry.
        row: ``(Pr,)`` the cell row.
        col_owner: ``(Pc,)`` the window of each column entry.
        col: ``(Pc,)`` the cell column.
        row_entry: ``(C,)`` the row entry of each candidate.
        col_entry: ``(C,)`` the column entry of each candidate.
    """

    row_owner: Tensor
    row: Tensor
    col_owner: Tensor
    col: Tensor
    row_entry: Tensor
    col_entry: Tensor


def expand_windows(rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor]) -> Windows:
    """List the cells of P rectangular windows.

    What depends on the row or the column alone is computed once per entry, not once per cell.

    Args:
        rows: first and last row of each window, ``(P,)`` int64 each, both included.
        cols: first and last column of each window, likewise.
    """
    row_owner, row = expand_ranges(*rows)  # (Pr,)
    col_owner, col = expand_ranges(*cols)  # (Pc,)
    counts = (cols[1] - cols[0] + 1).clamp(min=0)  # (P,)
    end = counts.cumsum(0)  # (P,), one past the window's last column entry
    row_entry, col_entry = expand_ranges(
        (end - counts).index_select(0, row_owner), (end - 1).index_select(0, row_owner)
    )  # (C,)
    return Windows(row_owner, row, col_owner, col, row_entry, col_entry)


def pick_best(cells: Tensor, scores: Tensor, owners: Tensor, size: int) -> Tensor:
    """Say which candidate wins its cell: the highest score, and among equals the lowest owner.

    That is what ``max`` over a dense (owner, cell) matrix gives. Score and owner are packed into one integer, whose
    maximum does not depend on the order of writing, so the result is the same on every device.

    Args:
        cells: ``(C,)`` int64 in [0, size).
        scores: ``(C,)`` float32, >= 0: the bits of such floats sort like integers.
        owners: ``(C,)`` int64 in [0, 2 ** 31).
        size: the number of cells.

    Returns:
        ``(C,)`` bool.
    """
    keys = (scores.view(torch.int32).long() << 32) | (0x7FFFFFFF - owners)  # (C,)
    best = keys.new_full((size,), -1).scatter_reduce_(0, cells, keys, "amax")  # (size,)
    return best[cells] == keys
