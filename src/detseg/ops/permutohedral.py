"""Gaussian filtering in many dimensions, by the permutohedral lattice.

Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010, doi
10.1111/j.1467-8659.2009.01645.x).

Points are splatted onto the corners of the simplex that holds each, blurred along the d + 1 directions of the lattice,
and read back with the same weights. The cost is linear in the number of points, whatever the width of the Gaussian.
Built of whole-array operations: corners are packed into one integer each, sorted, and found by binary search. To splat,
to blur along a direction and to slice are each a product with a sparse matrix, read row by row: that writes every
number once, and needs a tenth of the time of adding shares to the corners one by one.

Letters: N points, D dimensions, M corners of the lattice that some point touches, C values of a point.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor


class SparseRows(NamedTuple):
    """A sparse matrix of R rows with E entries in all, for products with dense ones.

    torch's own CSR tensors are no faster here, and warn that they are unfinished.

    Attributes:
        column: ``(E,)`` int64, row after row.
        weight: ``(E,)`` float64.
        start: ``(R,)`` int64, where each row begins among the entries.
    """

    column: Tensor
    weight: Tensor
    start: Tensor

    def times(self, table: Tensor) -> Tensor:
        """Return the product ``(R, C)`` with a dense matrix ``(columns, C)``, in its type."""
        weight = self.weight.to(table)
        return F.embedding_bag(self.column, table, self.start, mode="sum", per_sample_weights=weight)


class PermutohedralLattice:
    """Filters values at given points with a Gaussian of unit standard deviation, about as ``exp(-|p - q|^2 / 2)``.

    Args:
        points: ``(N, D)`` positions in standard deviations, float32 or float64.

    Raises:
        ValueError: there is no point or no dimension, a position is not finite, or they lie so far apart that the
            corners between them cannot be numbered in 63 bits.
    """

    def __init__(self, points: Tensor) -> None:
        if points.ndim != 2 or 0 in points.shape or not bool(points.isfinite().all()):
            raise ValueError(
                f"PermutohedralLattice: points must be (N, D) finite numbers with N and D of at least 1, got "
                f"{tuple(points.shape)}"
            )
        corners, weight = _corners(points.double())  # (N, D + 1, D + 1) int64, (N, D + 1) float64
        code, steps = _pack(corners)  # (N, D + 1) int64, (D + 1,) code of a step in each direction
        ranked, order = code.flatten().sort(stable=True)  # (N * (D + 1),) each
        known, run, count = torch.unique_consecutive(ranked, return_inverse=True, return_counts=True)  # (M,) sorted
        corner = torch.empty_like(order).scatter(0, order, run)  # (N * (D + 1),)
        side = points.shape[1] + 1
        self._splat = SparseRows(order // side, weight.flatten()[order], count.cumsum(0) - count)  # M rows of points
        self._blur = [_neighbours(known, step) for step in steps.tolist()]  # M rows of corners each
        self._slice = SparseRows(corner, weight.flatten(), torch.arange(0, len(corner), side, device=corner.device))
        # What splatting, blurring and slicing make of a lone point's neighbourhood.
        self.gain = 1 / (1 + 2.0 ** -points.shape[1])

    def filter(self, values: Tensor) -> Tensor:
        """Return the weighted sums over all points ``(N, C)``, in the type of ``values`` ``(N, C)``."""
        corners = self._splat.times(values)  # (M, C)
        for along in self._blur:
            corners = along.times(corners)
        return self._slice.times(corners) * self.gain  # (N, C)


def _corners(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners of each point's simplex ``(N, D + 1, D + 1)`` int64, and barycentric weights ``(N, D + 1)``.

    A corner is D + 1 integers whose sum is 0, all with the same remainder by D + 1 (section 3.2 of the paper).
    """
    number, dimensions = points.shape
    side = dimensions + 1
    # Onto the hyperplane of zero sum, scaled so that blurring with (1/2, 1, 1/2) is a Gaussian of unit deviation.
    order = torch.arange(1, side, dtype=torch.float64, device=points.device)  # (D,)
    scale = math.sqrt(2 / 3) * side / (order * (order + 1)).sqrt()  # (D,)
    scaled = points * scale  # (N, D)
    above = scaled.flip(1).cumsum(1).flip(1)  # (N, D) sum of this and the later ones
    lifted = torch.cat([above[:, :1], torch.cat([above[:, 1:], above.new_zeros(number, 1)], 1) - order * scaled], 1)
    # The nearest point of remainder 0, and the order of the differences to it (ibid., section 3.3).
    nearest = (lifted / side).round() * side  # (N, D + 1)
    difference = lifted - nearest  # (N, D + 1)
    rank = difference.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (N, D + 1)
    rank = rank + (nearest.sum(1, keepdim=True) / side).round().long()  # off by the excess of the rounded sum
    nearest = nearest + side * ((rank < 0).double() - (rank > dimensions).double())  # (N, D + 1)
    rank = rank + side * ((rank < 0).long() - (rank > dimensions).long())  # (N, D + 1) a permutation of 0..D
    difference = (lifted - nearest) / side  # (N, D + 1)
    ascending = difference.gather(
        1, rank.argsort(dim=1).flip(1)
    )  # (N, D + 1) by falling rank, so the smallest comes first
    weight = torch.cat(
        [ascending[:, :1] - ascending[:, -1:] + 1, ascending.diff(dim=1)], 1
    )  # (N, D + 1) of corner 0..D
    remainder = torch.arange(side, device=points.device)  # (D + 1,) of each corner
    beyond = rank[:, None] > (dimensions - remainder)[None, :, None]  # (N, D + 1, D + 1)
    corner = nearest.long()[:, None] + remainder[None, :, None] - side * beyond.long()  # (N, D + 1, D + 1)
    return corner, weight


def _pack(corners: Tensor) -> tuple[Tensor, Tensor]:
    """Return one int64 for each corner ``(N, D + 1)``, and what a step in each direction adds to it ``(D + 1,)``.

    The last coordinate follows from the others. A step along direction k adds 1 to all coordinates but subtracts D from
    the k-th; the spans leave room for it, so that no two corners and no step beyond the edge meet.
    """
    side = corners.shape[-1]
    low = corners[..., :-1].amin((0, 1)) - side  # (D,)
    span = corners[..., :-1].amax((0, 1)) + side + 1 - low  # (D,)
    if float(span.double().log2().sum()) >= 62:
        raise ValueError(
            f"PermutohedralLattice: the points span {(span // side).tolist()} standard deviations, too many to number; "
            "widen the kernel or shrink the image"
        )
    place = torch.cat([span.new_ones(1), span[:-1].cumprod(0)])  # (D,)
    code = ((corners[..., :-1] - low) * place).sum(-1)  # (N, D + 1)
    whole = place.sum()
    return code, torch.cat([whole - side * place, whole[None]])


def _neighbours(known: Tensor, step: int) -> SparseRows:
    """Return the blur with 1/2, 1, 1/2 along a direction: each corner and those a step ahead and behind.

    Args:
        known: ``(M,)`` int64, the codes of the corners, sorted.
        step: what a step adds to a code.
    """
    beside = torch.stack([known, known + step, known - step], dim=1)  # (M, 3) wanted codes
    place = torch.searchsorted(known, beside).clamp(max=len(known) - 1)  # (M, 3)
    half = known.new_tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    weight = half * (known[place] == beside)  # (M, 3), 0 where there is no such corner
    start = torch.arange(0, place.numel(), 3, device=known.device)  # (M,)
    return SparseRows(place.flatten(), weight.flatten(), start)
