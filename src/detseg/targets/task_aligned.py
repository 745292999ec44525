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

from detseg.targets.lattice import Lattice, expand_windows, pick_best, within
from detseg.targets.sparse import paired_iou

MOST_CANDIDATES = 1 << 20  # that are looked at together: objects that fill the image have a candidate in every cell


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
        parts = [self._best(part, boxes, classes, image, lattice, predictions) for part in _chunks(boxes, lattice)]
        if parts:
            found = _Matches(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
            found = found.take(pick_best(found.cell, found.iou, found.box, total).nonzero()[:, 0])
            matched[found.cell] = found.box
            quality[found.cell] = _scores(found, len(boxes))
        return matched.view(batch, -1), quality.view(batch, -1)

    def _best(
        self, own: Tensor, boxes: Tensor, classes: Tensor, image: Tensor, lattice: Lattice, predictions: Predictions
    ) -> _Matches:
        """Return the best references of some objects, whose rows are ``own``."""
        box, reference = _inside(boxes[own], lattice)  # (C,) each
        box = own[box]  # (C,)
        cell = image[box] * lattice.total + reference  # (C,)
        score = predictions.logits[cell, classes[box]].float().sigmoid()  # (C,)
        iou = paired_iou(predictions.boxes(cell), boxes[box]).nan_to_num(0.0).clamp(0.0, 1.0)  # (C,)
        aligned = (score**self.alpha * iou**self.beta).nan_to_num(0.0)  # (C,) equation 5
        candidates = _Matches(box, cell, aligned, iou).take((aligned > 0).nonzero()[:, 0])
        return candidates.take(_top(candidates.box, candidates.aligned, self.top_k))

    def __repr__(self) -> str:
        return f"TaskAlignedAssigner(top_k={self.top_k}, alpha={self.alpha}, beta={self.beta})"


def _scores(found: _Matches, count: int) -> Tensor:
    """Return t scaled per object so that the largest is the object's largest IoU, ``(M,)`` (section 3.2.2)."""
    best = found.aligned.new_zeros(2, count)  # (2, G)
    best[0].scatter_reduce_(0, found.box, found.aligned, "amax")
    best[1].scatter_reduce_(0, found.box, found.iou, "amax")
    return found.aligned / best[0][found.box] * best[1][found.box]


def _top(owner: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values of each owner, among equals the first.

    Owner and value are packed into one integer, so that one sort does for all: the bits of floats >= 0 sort like
    integers.

    Args:
        owner: ``(C,)`` int64 in [0, 2 ** 31).
        values: ``(C,)`` float32, >= 0.
        count: how many stay.
    """
    keys = (owner << 32) | (0x7FFFFFFF - values.view(torch.int32).long())  # (C,)
    order = keys.sort(stable=True).indices  # (C,)
    number = torch.bincount(owner)  # (owners,)
    rank = torch.arange(len(owner), device=owner.device) - (number.cumsum(0) - number)[owner[order]]  # (C,)
    return order[(rank < count).nonzero()[:, 0]]


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


def _inside(boxes: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """List the references whose centre lies inside a box: row of the box ``(C,)`` and reference ``(C,)``.

    The boxes ascend; of each box, shape by shape, the references do.
    """
    shapes, number = lattice.shapes, len(lattice.shapes.level)
    first, last = (edge.flatten(0, 1) for edge in _reach(boxes, lattice))  # (G * S, 2) each
    windows = expand_windows((first[:, 1], last[:, 1]), (first[:, 0], last[:, 0]))
    owner = windows.row_owner[windows.row_entry]  # (C,) box * S + shape
    box, shape = owner // number, owner % number  # (C,) each
    row, col = windows.row[windows.row_entry], windows.col[windows.col_entry]  # (C,) each
    reference = shapes.first[shape] + (row * shapes.cols[shape] + col) * shapes.step[shape]  # (C,)
    own = lattice.boxes[reference]  # (C, 4)
    centre = (own[:, :2] + own[:, 2:]) / 2  # (C, 2)
    kept = ((centre > boxes[box, :2]) & (centre < boxes[box, 2:])).all(1).nonzero()[:, 0]
    return box[kept], reference[kept]
