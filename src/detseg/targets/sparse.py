"""IoU assignment of anchors for dense detectors: Lin et al., Focal Loss for Dense Object Detection, 2017, section 4.1.

Built: the rule of ``IoUMatcher`` with low-quality matches, for all images of a batch at once. Differs from a dense
matcher only in what is looked at: for every box and anchor shape, the window of cells in which the IoU can reach the
negative threshold, or where no anchor reaches it, the best IoU that the box has. Outside of the windows an anchor is
background whatever its exact IoU. The IoUs are computed by torchvision's formula in its order of rounding, so the
result is the same on every anchor, ties included.

Letters: B images, G boxes of all images, N anchors of one image, S anchor shapes, P (box, shape) pairs, C candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detseg.targets.lattice import Lattice, Windows, expand_ranges, expand_windows, pick_best, within
from detseg.targets.matchers import BELOW, BETWEEN

_RELATIVE_SLACK = 1e-3  # of an IoU bound: windows may be a little wide, never narrow; the exact test follows
_PIXEL_SLACK = 0.01  # of a window's side, against rounding of coordinates up to about 1e5 pixels


class Candidates(NamedTuple):
    """(box, anchor) pairs that may matter.

    Attributes:
        box: ``(C,)`` the row of the box among the G.
        cell: ``(C,)`` the anchor, counted through the batch (image * N + anchor).
        iou: ``(C,)``.
    """

    box: Tensor
    cell: Tensor
    iou: Tensor

    def take(self, index: Tensor) -> Candidates:
        """Return some of them."""
        return Candidates(self.box[index], self.cell[index], self.iou[index])


class SparseIoUMatcher:
    """Give every anchor its best box, background, or neither.

    Args:
        positive: IoU from which an anchor learns its best box.
        negative: IoU below which it is background; between the two it is ignored.
        allow_low_quality: whether the best anchors of each box learn their best box in any case, however low their
            IoU (ties too), so that no box goes without; RetinaNet's paper does without, its code and torchvision's
            do not.

    Raises:
        ValueError: not 0 < negative <= positive <= 1.
    """

    def __init__(self, *, positive: float = 0.5, negative: float = 0.4, allow_low_quality: bool = True) -> None:
        if not 0.0 < negative <= positive <= 1.0:
            raise ValueError(
                f"SparseIoUMatcher: negative is {negative} and positive {positive}; "
                "0 < negative <= positive <= 1 must hold"
            )
        self.positive = positive
        self.negative = negative
        self.allow_low_quality = allow_low_quality

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Assign the boxes of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images, those of one image side by side.
            image: ``(G,)`` int64 ascending, the image of each box.
            batch: the number B of images.
            lattice: the anchors of one image.

        Returns:
            ``(B, N)`` int64: the row of the box among the G, ``BELOW`` (-1) for background or ``BETWEEN`` (-2).
        """
        matched = boxes.new_full((batch * lattice.total,), BELOW, dtype=torch.int64)
        if len(boxes) == 0:
            return matched.view(batch, -1)
        found = self.candidates(boxes, image, lattice)
        near = found.take((found.iou >= self.negative).nonzero()[:, 0])
        wins = pick_best(near.cell, near.iou, near.box, len(matched)).nonzero()[:, 0]  # (W,)
        positive = near.iou[wins] >= self.positive
        matched[near.cell[wins]] = torch.where(positive, near.box[wins], BETWEEN)
        if self.allow_low_quality:
            cells, owners = self._low_quality(found, boxes, image, batch, lattice)
            matched[cells] = owners
        return matched.view(batch, -1)

    def candidates(self, boxes: Tensor, image: Tensor, lattice: Lattice) -> Candidates:
        """Return every pair whose IoU reaches the negative threshold or, with low quality, the best one of its box."""
        bound = self.negative * torch.ones_like(boxes[:, :1])  # (G, 1)
        if self.allow_low_quality:
            best = _best_iou(boxes, lattice)  # (G, 1)
            bound = torch.where(best > 0, bound.minimum(best), 2.0)  # a box that no anchor touches reaches none
        box, shape, windows = _windows(boxes, bound * (1 - _RELATIVE_SLACK), lattice)
        return _overlaps(boxes, image, box, shape, windows, lattice)

    def _low_quality(
        self, found: Candidates, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice
    ) -> tuple[Tensor, Tensor]:
        """Return the best anchors of every box ``(Q,)``, and for each of them the best box ``(Q,)``."""
        best = found.iou.new_zeros(len(boxes)).scatter_reduce_(0, found.box, found.iou, "amax")  # (G,)
        cells = torch.unique(found.cell[((found.iou == best[found.box]) & (found.iou > 0)).nonzero()[:, 0]])  # (Q,)
        # The best box of such an anchor may be any of its image, with an IoU below every bound: look at them all.
        count = torch.bincount(image, minlength=batch)  # (B,)
        end = count.cumsum(0)  # (B,)
        frame = cells // lattice.total  # (Q,)
        index, box = expand_ranges((end - count)[frame], end[frame] - 1)  # (C,) each
        iou = paired_iou(boxes[box], lattice.boxes[(cells % lattice.total)[index]])  # (C,)
        wins = pick_best(index, iou, box, len(cells)).nonzero()[:, 0]  # (Q,)
        return cells[index[wins]], box[wins]


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU ``(N,)`` of boxes in pairs, ``(N, 4)`` each, equal bit by bit to ``torchvision.ops.box_iou``'s."""
    side = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    inter = side[:, 0] * side[:, 1]  # (N,)
    return inter / (_area(first) + _area(second) - inter)


def _best_iou(boxes: Tensor, lattice: Lattice) -> Tensor:
    """Return the best IoU of each box with any anchor ``(G, 1)``.

    With a given shape the overlap falls with the distance along x and along y, so it is best at the nearest cell.
    """
    shapes = lattice.shapes
    overlap = torch.ones_like(boxes[:, :1])  # (G, 1)
    for axis, stride, cells in ((0, shapes.stride_x, shapes.cols), (1, shapes.stride_y, shapes.rows)):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]  # (G, 1) each
        base_low, base_high = shapes.base[:, axis], shapes.base[:, axis + 2]  # (S,) each
        offset = ((low + high - base_low - base_high) / 2 / stride).round()  # (G, S), cells from the first one
        shift = torch.minimum(offset.clamp(min=0), cells - 1) * stride  # (G, S)
        side = (torch.minimum(high, base_high + shift) - torch.maximum(low, base_low + shift)).clamp(min=0)  # (G, S)
        overlap = overlap * side  # (G, S)
    iou = overlap / (_area(boxes)[:, None] + _area(shapes.base) - overlap)  # (G, S)
    return iou.amax(1, keepdim=True)


def _windows(boxes: Tensor, bound: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor, Windows]:
    """Pair boxes with the shapes and cells at which the IoU can reach ``bound`` (G, 1).

    IoU >= t means an intersection of at least t / (1 + t) of both areas' sum, thus an overlap along x of at least
    that over the smaller height, and the centres may differ along x by half of both widths less this overlap.
    """
    shapes = lattice.shapes
    needed = bound / (1 + bound) * (_area(boxes)[:, None] + _area(shapes.base))  # (G, S) square pixels
    sides = boxes[:, None, 2:] - boxes[:, None, :2]  # (G, 1, 2)
    base_sides = shapes.base[:, 2:] - shapes.base[:, :2]  # (S, 2)
    smaller = torch.minimum(sides, base_sides)  # (G, S, 2)
    box, shape = (smaller[..., 0] * smaller[..., 1] >= needed).nonzero().unbind(1)  # (P,) each
    smaller = smaller[box, shape]  # (P, 2)
    overlap = needed[box, shape, None] / smaller.flip(1)  # (P, 2) along x needs the height, and along y the width
    reach = (sides[box, 0] + base_sides[shape]) / 2 - overlap + _PIXEL_SLACK  # (P, 2)
    centre = (boxes[:, :2] + boxes[:, 2:])[box] / 2  # (P, 2)
    offset = centre - ((shapes.base[:, :2] + shapes.base[:, 2:]) / 2)[shape]  # (P, 2) from the first cell's anchor
    stride = torch.stack((shapes.stride_x, shapes.stride_y), dim=1)[shape]  # (P, 2)
    limit = torch.stack((shapes.cols, shapes.rows), dim=1)[shape]  # (P, 2)
    first, last = within(((offset - reach) / stride).ceil(), ((offset + reach) / stride).floor(), limit)  # (P, 2) each
    return box, shape, expand_windows((first[:, 1], last[:, 1]), (first[:, 0], last[:, 0]))


def _overlaps(
    boxes: Tensor, image: Tensor, box: Tensor, shape: Tensor, windows: Windows, lattice: Lattice
) -> Candidates:
    """Compute the IoU of every candidate; widths and heights of the overlaps once per column and row entry."""
    shapes = lattice.shapes
    sides = []
    for axis, owner, index, stride in (
        (0, windows.col_owner, windows.col, shapes.stride_x),
        (1, windows.row_owner, windows.row, shapes.stride_y),
    ):
        low, high = boxes[box, axis][owner], boxes[box, axis + 2][owner]  # (E,) each
        shift = (index * stride[shape][owner]).to(boxes.dtype)  # (E,)
        base_low, base_high = shapes.base[shape, axis][owner], shapes.base[shape, axis + 2][owner]  # (E,) each
        sides.append((torch.minimum(high, base_high + shift) - torch.maximum(low, base_low + shift)).clamp(min=0))
    pair = windows.row_owner[windows.row_entry]  # (C,)
    inter = sides[0][windows.col_entry] * sides[1][windows.row_entry]  # (C,)
    iou = inter / ((_area(boxes)[box] + _shape_area(lattice)[shape])[pair] - inter)  # (C,)
    row_start = (image[box] * lattice.total + shapes.first[shape])[windows.row_owner]  # (Pr,)
    row_start = row_start + windows.row * (shapes.cols * shapes.step)[shape][windows.row_owner]  # (Pr,)
    col_start = windows.col * shapes.step[shape][windows.col_owner]  # (Pc,)
    return Candidates(box[pair], row_start[windows.row_entry] + col_start[windows.col_entry], iou)


def _shape_area(lattice: Lattice) -> Tensor:
    """Return the area of each shape ``(S,)`` as rounded at the first cell; whole-pixel anchors have it everywhere."""
    return _area(lattice.shapes.base)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
