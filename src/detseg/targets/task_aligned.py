"""Task-aligned assignment: Feng et al., TOOD: Task-aligned One-stage Object Detection, 2021, arXiv:2108.07755.

Built: section 3.2. A reference is the better for an object the more its own prediction says so: the alignment is
t = s^alpha * u^beta (equation 5), of the score s for the object's class and the IoU u of the predicted box. Of the
references whose centre lies inside the object the ``top_k`` best learn it; of several objects the one with the highest
IoU wins. What they shall score is t scaled per object so that its largest value is the object's largest IoU. The
defaults are those of later YOLO detectors (alpha 0.5, beta 6, 10 references; the paper has 1, 6 and 13). Differs from
the paper: a reference with alignment 0 learns nothing. So boxes must meet objects from the start; those of FCOS, whose
distances start at 0, do so only where they are predicted as distributions.

Sparse: only the cells inside of an object are looked at, and only their predictions decoded.

Letters: B images, G objects of all images, N references of one image, K classes, S shapes (references of one cell,
over all levels), C candidates, M matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from detseg.targets.lattice import Lattice, expand_ranges, expand_windows, pick_best, within

MOST_CANDIDATES = 1 << 18  # that are looked at together: what one step leaves, the next finds in the cache


@dataclass(frozen=True)
class Predictions:
    """What the network says about the references of a batch, counted through it (image * N + reference).

    Attributes:
        logits: ``(B * N, K)`` of the classes.
        boxes: gives the predicted boxes ``(C, 4)`` xyxy pixels of some references ``(C,)``.
    """

    logits: Tensor
    boxes: Callable[[Tensor], Tensor]


@runtime_checkable
class PredictionAssigner(Protocol):
    """Anything that says which object each reference shall learn from what the network predicts there."""

    def align(
        self, boxes: Tensor, classes: Tensor, image: Tensor, batch: int, lattice: Lattice, predictions: Predictions
    ) -> tuple[Tensor, Tensor]:
        """Return the object of each reference ``(B, N)`` int64 and what it shall score ``(B, N)``.

        See ``TaskAlignedAssigner.align``.
        """
        ...


class _Matches(NamedTuple):
    """(object, reference) pairs.

    Attributes:
        box: ``(M,)`` the row of the object among the G.
        cell: ``(M,)`` the reference, counted through the batch (image * N + reference).
        aligned: ``(M,)`` t, >= 0.
        iou: ``(M,)`` u, of the predicted box.
    """

    box: Tensor
    cell: Tensor
    aligned: Tensor
    iou: Tensor

    def take(self, index: Tensor) -> _Matches:
        """Return some of them."""
        return _Matches(*(column[index] for column in self))


class _Scene:
    """The objects of a batch and what is predicted, candidate by candidate.

    Numbers of a candidate are gathered column by column with ``index_select``, which takes a fifth of the time of rows
    taken by a tensor, and areas are computed once for each box.

    Args:
        boxes: ``(G, 4)`` xyxy pixels.
        classes: ``(G,)`` int64.
        start: ``(G,)`` the first reference of each object's image, counted through the batch.
        lattice: the references of one image.
        predictions: of all of them.
    """

    def __init__(
        self, boxes: Tensor, classes: Tensor, start: Tensor, lattice: Lattice, predictions: Predictions
    ) -> None:
        self.boxes, self.classes, self.start, self.lattice = boxes, classes, start, lattice
        self.predictions = predictions
        self.logits = predictions.logits.reshape(-1)  # (B * N * K,)
        self.columns = _columns(boxes)  # 5 x (G,)
        self.decoded: list[Tensor] | None = None  # 5 x (B * N,), once they are wanted

    def score(self, cell: Tensor, box: Tensor) -> Tensor:
        """Return the scores ``(C,)`` of the objects' classes."""
        entry = cell * self.predictions.logits.shape[1] + self.classes.index_select(0, box)  # (C,)
        return self.logits.index_select(0, entry).float().sigmoid_()

    def iou(self, cell: Tensor, box: Tensor) -> Tensor:
        """Return the IoU ``(C,)`` of predicted boxes and objects, 0 where it is not a number."""
        x0, y0, x1, y1, area = self._predicted(cell)  # (C,) each
        u0, v0, u1, v1, wanted = (column.index_select(0, box) for column in self.columns)  # (C,) each
        width = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)  # (C,)
        height = torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0)  # (C,)
        inter = width.mul_(height)  # (C,)
        return (inter / area.add_(wanted).sub_(inter)).nan_to_num_(0.0).clamp_(0.0, 1.0)

    def _predicted(self, cell: Tensor) -> list[Tensor]:
        """Return corners and area of the predicted boxes, 5 x ``(C,)``; of many candidates each is decoded once."""
        total = len(self.predictions.logits)
        if self.decoded is None and len(cell) < total:
            return _columns(self.predictions.boxes(cell))
        if self.decoded is None:
            self.decoded = _columns(self.predictions.boxes(torch.arange(total, device=cell.device)))
        return [column.index_select(0, cell) for column in self.decoded]


def _columns(boxes: Tensor) -> list[Tensor]:
    """Return x0, y0, x1, y1 and the area of boxes ``(N, 4)``, each ``(N,)`` and contiguous."""
    x0, y0, x1, y1 = boxes.T.contiguous()  # (N,) each
    return [x0, y0, x1, y1, (x1 - x0) * (y1 - y0)]


class TaskAlignedAssigner:
    """Give every reference the object for which class and box are predicted best together, or none.

    Args:
        top_k: references per object, at most.
        alpha: exponent of the score, >= 0.
        beta: exponent of the IoU, > 0.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, *, top_k: int = 10, alpha: float = 0.5, beta: float = 6.0) -> None:
        if top_k < 1 or not alpha >= 0 or not beta > 0:
            raise ValueError(
                f"TaskAlignedAssigner: top_k is {top_k}, alpha {alpha} and beta {beta}; "
                "top_k must be at least 1, alpha >= 0 and beta > 0"
            )
        self.top_k = top_k
        self.alpha = alpha
        self.beta = beta

    def align(
        self, boxes: Tensor, classes: Tensor, image: Tensor, batch: int, lattice: Lattice, predictions: Predictions
    ) -> tuple[Tensor, Tensor]:
        """Assign the objects of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images.
            classes: ``(G,)`` int64 in 0..K-1.
            image: ``(G,)`` int64, the image of each object.
            batch: the number B of images.
            lattice: the references of one image.
            predictions: of the network, without gradients.

        Returns:
            ``(B, N)`` int64, the row of the object among the G, or -1; and ``(B, N)`` float32 in [0, 1], what the
            reference shall score for the object's class, 0 without one.
        """
        total = batch * lattice.total
        matched = boxes.new_full((total,), -1, dtype=torch.int64)
        quality = boxes.new_zeros(total, dtype=torch.float32)
        scene = _Scene(boxes, classes, image * lattice.total, lattice, predictions)
        parts = [self._best(part, scene) for part in _chunks(boxes, lattice)]
        if parts:
            found = _Matches(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
            found = found.take(pick_best(found.cell, found.iou, found.box, total).nonzero()[:, 0])
            matched[found.cell] = found.box
            quality[found.cell] = _scores(found, len(boxes))
        return matched.view(batch, -1), quality.view(batch, -1)

    def _best(self, own: Tensor, scene: _Scene) -> _Matches:
        """Return the best references of some objects, whose rows are ``own``."""
        part, cell = _inside(scene.boxes[own], scene.start[own], scene.lattice)  # (C,) each
        box = own.index_select(0, part)  # (C,)
        score, iou = scene.score(cell, box), scene.iou(cell, box)  # (C,) each
        aligned = (score**self.alpha).mul_(iou**self.beta).nan_to_num_(0.0)  # (C,) equation 5
        best = _top(part, aligned, len(own), self.top_k)  # (M,)
        return _Matches(box, cell, aligned, iou).take(best[(aligned[best] > 0).nonzero()[:, 0]])

    def __repr__(self) -> str:
        return f"TaskAlignedAssigner(top_k={self.top_k}, alpha={self.alpha}, beta={self.beta})"


def _scores(found: _Matches, count: int) -> Tensor:
    """Return t scaled per object so that the largest is the object's largest IoU, ``(M,)`` (section 3.2.2)."""
    best = found.aligned.new_zeros(2, count)  # (2, G)
    best[0].scatter_reduce_(0, found.box, found.aligned, "amax")
    best[1].scatter_reduce_(0, found.box, found.iou, "amax")
    return found.aligned / best[0][found.box] * best[1][found.box]


def _top(owner: Tensor, values: Tensor, owners: int, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values of each owner, owner by owner, among equals the first.

    Owner and value are packed into one integer, so that one sort does for all: the bits of floats >= 0 sort like
    integers. Before it most values are dropped: dealt out to ``count`` hands, an owner's ``count``-th largest is at
    least the smallest of the hands' best.

    Args:
        owner: ``(C,)`` int64 in [0, owners).
        values: ``(C,)`` float32, >= 0.
        owners: how many there are, below 2 ** 31.
        count: how many values of each stay.
    """
    hand = owner * count + torch.arange(len(owner), device=owner.device) % count  # (C,)
    best = values.new_zeros(owners * count).scatter_reduce_(0, hand, values, "amax")  # (owners * count,)
    least = best.view(owners, count).amin(1)  # (owners,)
    kept = (values >= least.index_select(0, owner)).nonzero()[:, 0]  # (M,)
    owner, values = owner[kept], values[kept]
    keys = (owner << 32) | (0x7FFFFFFF - values.view(torch.int32).long())  # (M,)
    order = keys.sort(stable=True).indices  # (M,)
    number = torch.bincount(owner, minlength=owners)  # (owners,)
    rank = torch.arange(len(owner), device=owner.device) - (number.cumsum(0) - number)[owner[order]]  # (M,)
    return kept[order[(rank < count).nonzero()[:, 0]]]


def _reach(boxes: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return first and last cell ``(G, S, 2)`` int64, as x, y, of the window of cells whose centre may lie inside."""
    shapes = lattice.shapes
    stride = torch.stack((shapes.stride_x, shapes.stride_y), dim=1)  # (S, 2)
    limit = torch.stack((shapes.cols, shapes.rows), dim=1)  # (S, 2)
    middle = (shapes.base[:, :2] + shapes.base[:, 2:]) / 2  # (S, 2)
    low, high = boxes[:, None, :2] - middle, boxes[:, None, 2:] - middle  # (G, S, 2) each
    return within((low / stride).floor(), (high / stride).ceil(), limit)


def _chunks(boxes: Tensor, lattice: Lattice) -> Iterator[Tensor]:
    """Yield the rows of the objects in order, as many at a time as have about ``MOST_CANDIDATES``."""
    first, last = _reach(boxes, lattice)  # (G, S, 2) each
    count = (last - first + 1).clamp(min=0).prod(2).sum(1)  # (G,)
    group = (count.cumsum(0) - count) // MOST_CANDIDATES  # (G,) ascending
    sizes = torch.unique_consecutive(group, return_counts=True)[1].tolist()
    yield from torch.split(torch.arange(len(boxes), device=boxes.device), sizes) if sizes else ()


def _inside(boxes: Tensor, start: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """List the references whose centre lies inside a box: row of the box ``(C,)`` and reference ``(C,)``.

    ``start`` (G,) is added to the references of each box. The boxes ascend; of each box, shape by shape, the references
    do.
    """
    shapes, number = lattice.shapes, len(lattice.shapes.level)
    first, last = (edge.flatten(0, 1) for edge in _reach(boxes, lattice))  # (G * S, 2) each
    (left, top), (right, bottom) = first.unbind(1), last.unbind(1)  # (G * S,) each
    down = shapes.cols * shapes.step  # (S,) from a reference to that of the next row
    across = shapes.step  # (S,) likewise to that of the next column
    left, right = _tighten(boxes, lattice, left, right, across, axis=0)
    top, bottom = _tighten(boxes, lattice, top, bottom, down, axis=1)
    windows = expand_windows((top, bottom), (left, right))
    shape = windows.row_owner % number  # (Pr,)
    box = windows.row_owner // number  # (Pr,)
    row = start[box] + shapes.first[shape] + windows.row * down[shape]  # (Pr,)
    col = windows.col * across[windows.col_owner % number]  # (Pc,)
    entry = windows.row_entry  # (C,)
    return box.index_select(0, entry), row.index_select(0, entry) + col.index_select(0, windows.col_entry)


def _tighten(
    boxes: Tensor, lattice: Lattice, first: Tensor, last: Tensor, step: Tensor, *, axis: int
) -> tuple[Tensor, Tensor]:
    """Leave of windows of rows or columns ``(G * S,)`` those whose centres lie inside the box, and return the ends.

    A centre's x depends on the column alone and its y on the row, so that no candidate needs to be looked at.
    """
    number = len(step)
    owner, index = expand_ranges(first, last)  # (E,) each
    shape = owner % number  # (E,)
    cell = lattice.shapes.first.index_select(0, shape) + index * step.index_select(0, shape)  # (E,)
    edges = lattice.boxes.index_select(0, cell)  # (E, 4)
    centre = (edges[:, axis] + edges[:, axis + 2]) / 2  # (E,)
    own = boxes.index_select(0, owner // number)  # (E, 4)
    inside = ((centre > own[:, axis]) & (centre < own[:, axis + 2])).nonzero()[:, 0]  # side by side in each window
    count = torch.bincount(owner[inside], minlength=len(first))  # (G * S,)
    lowest = first.scatter_reduce(0, owner[inside], index[inside], "amin", include_self=False)  # (G * S,)
    return lowest, lowest + count - 1
