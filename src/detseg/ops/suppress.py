"""Suppression one box at a time: take the best box, lower the others of its label by their IoU with it, begin again.

This is the sequence that Soft-NMS is defined by, figure 2 of `"Soft-NMS - Improving Object Detection With One Line of
Code" <https://arxiv.org/abs/1704.04503>`_; with factors of 0 and 1 it is greedy NMS. Computed to the letter, in
float64, on the host. What makes it fast:

- the overlaps of the best candidates are found together; they serve for as long as the best box is one of these,
- which boxes may overlap at all is asked of coordinates rounded to a grid of 16 bits,
- boxes that are taken or fall below the floor leave the arrays.

Letters: N boxes, n of them in the running, k candidates, P pairs of a candidate and a box that it may overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detseg.ops.nms import check_candidates

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Factor = Callable[[Ints, Floats], Floats]
"""Says what the scores of boxes are multiplied by ``(P,)``, in [0, 1], given the row of the box that was taken ``(P,)``
and its IoU with them ``(P,)``."""

_CANDIDATES = 48  # more are wasted on duplicates of one object, fewer cost rounds; 24 to 96 differ by a fifth
_PAIRS = 1 << 19  # bounds the memory of a round to some 50 MiB
_GRID = 65535  # cells along a side


@dataclass
class Heap:
    """Boxes with what is asked of them again and again; slicing selects. In ``suppress`` those still in the running.

    Attributes:
        rows: ``(n,)`` where each stands in the input.
        scores: ``(n,)``, as far as they are lowered.
        labels: ``(n,)`` int32, renumbered from 0.
        boxes: ``(5, n)``: x1, y1, x2, y2 and the area.
        grid: ``(4, n)`` uint16: the corners, rounded down.
    """

    rows: Ints
    scores: Floats
    labels: NDArray[np.int32]
    boxes: Floats
    grid: NDArray[np.uint16]

    def __getitem__(self, index: Ints) -> Heap:
        boxes, grid = self.boxes.take(index, axis=1), self.grid.take(index, axis=1)  # (5, m), (4, m)
        return Heap(self.rows[index], self.scores[index], self.labels[index], boxes, grid)


def on_host(owner: str, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of one image in host memory, checked there; see ``nms.check_candidates``.

    Raises:
        ValueError: shapes disagree, or a coordinate or score is not finite.
    """
    moved = boxes.detach().cpu(), scores.detach().cpu(), labels.detach().cpu()
    check_candidates(owner, *moved)
    return moved


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, factor: Factor, *, floor: float) -> tuple[Tensor, Tensor]:
    """Run the sequence for the boxes of one image.

    Args:
        boxes: ``(N, 4)`` xyxy, finite, in host memory.
        scores: ``(N,)``, finite, likewise.
        labels: ``(N,)`` int64, likewise; boxes of different labels leave each other alone.
        factor: what a taken box does to the others.
        floor: boxes that score less are dropped, at the start and whenever they are lowered; at least 0.

    Returns:
        The rows taken ``(K,)`` int64 and the scores that they were taken at ``(K,)`` float64, descending; of equal
        scores the earlier row comes first.
    """
    rows: list[Ints] = []
    lowered: list[float] = []
    running = gather(boxes, scores, labels)
    while True:
        running = running[np.flatnonzero(running.scores >= floor)]
        if len(running.rows) == 0:
            taken = np.concatenate([*rows, running.rows])  # (K,)
            return torch.from_numpy(taken), torch.tensor(lowered, dtype=torch.float64)
        best = _best(running.scores)  # (k,)
        first, second, iou = pairs(running[best], running)  # (P,) each
        factors = factor(running.rows[best[first]], iou)  # (P,)
        lowers = np.flatnonzero(factors != 1.0)
        ends = np.searchsorted(first[lowers], np.arange(len(best) + 1))  # (k + 1,)
        places, reached = _take(running.scores, best, ends, second[lowers], factors[lowers], floor)
        rows.append(running.rows[places])
        lowered += reached


def gather(boxes: Tensor, scores: Tensor, labels: Tensor) -> Heap:
    """Return the boxes of one image, given as to ``suppress``, in the order of the input."""
    corners = np.ascontiguousarray(boxes.double().numpy().T)  # (4, N)
    area = (corners[2] - corners[0]) * (corners[3] - corners[1])  # (N,)
    low, high = corners.min(initial=np.inf), corners.max(initial=-np.inf)
    span = high - low if high > low else 1.0
    return Heap(
        rows=np.arange(len(boxes)),
        scores=scores.double().numpy(),
        labels=np.unique(labels.numpy(), return_inverse=True)[1].astype(np.int32),
        boxes=np.concatenate([corners, area[None]]),
        grid=((corners - low) / span * _GRID).astype(np.uint16),  # rounding keeps the order: none that overlap part
    )


def _best(scores: Floats) -> Ints:
    """Return the best ``(k,)``; of equal scores the earlier ones, so that the next to be taken is among them."""
    count = min(len(scores), _CANDIDATES, max(1, _PAIRS // len(scores)))
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    return np.concatenate([above, equal[: count - len(above)]])


def pairs(first: Heap, second: Heap) -> tuple[Ints, Ints, Floats]:
    """Return the pairs of one label that may overlap; all that do are among them.

    Args:
        first: k boxes of one ``gather``.
        second: n boxes of the same.

    Returns:
        The box of ``first`` ``(P,)`` as 0..k-1, ascending, that of ``second`` ``(P,)``, and their IoU ``(P,)``, which
        may be 0. A box in both is paired with itself too.
    """
    x1, y1, x2, y2 = second.grid  # (n,) each
    left, top, right, bottom = first.grid[:, :, None]  # (k, 1) each
    near = left <= x2  # (k, n)
    near &= x1 <= right
    near &= top <= y2
    near &= y1 <= bottom
    near &= first.labels[:, None] == second.labels
    # Of the flat array: in two dimensions numpy takes ten times as long.
    own, other = np.divmod(np.flatnonzero(near.ravel()), max(len(x1), 1))  # (P,), (P,)
    return own, other, _iou(first.boxes.take(own, axis=1), second.boxes.take(other, axis=1))


def _iou(first: Floats, second: Floats) -> Floats:
    """Return the IoU ``(P,)`` of boxes with their areas ``(5, P)``; 0 where neither has an area."""
    width = np.minimum(first[2], second[2]) - np.maximum(first[0], second[0])  # (P,)
    height = np.minimum(first[3], second[3]) - np.maximum(first[1], second[1])  # (P,)
    inner = np.maximum(width, 0.0) * np.maximum(height, 0.0)  # (P,)
    union = np.maximum(first[4] + second[4] - inner, np.finfo(np.float64).tiny)  # (P,)
    result: Floats = inner / union  # (P,)
    return result


def _take(
    scores: Floats, best: Ints, ends: Ints, second: Ints, factors: Floats, floor: float
) -> tuple[list[int], list[float]]:
    """Take boxes for as long as the best one is a candidate.

    Args:
        scores: ``(n,)``; changed in place, those of taken boxes to -1.
        best: ``(k,)`` the candidates.
        ends: ``(k + 1,)``: candidate c has the pairs from ``ends[c]`` to ``ends[c + 1]``.
        second: ``(P,)`` the box of each pair.
        factors: ``(P,)`` what its score is multiplied by when the candidate is taken.
        floor: lower scores are not taken.

    Returns:
        The boxes taken and the scores that they were taken at.
    """
    place = dict(zip(best.tolist(), range(len(best)), strict=True))
    bounds = ends.tolist()
    taken: list[int] = []
    reached: list[float] = []
    while True:
        top = int(scores.argmax())  # the earliest of equals
        score = float(scores[top])
        candidate = place.pop(top, None)
        if candidate is None or score < floor:
            scores[taken] = -1.0  # once more: times a factor of 0 it became a -0 that any floor lets pass
            return taken, reached
        pairs = slice(bounds[candidate], bounds[candidate + 1])
        scores[second[pairs]] *= factors[pairs]
        scores[top] = -1.0
        taken.append(top)
        reached.append(score)
