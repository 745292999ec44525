"""ATSS: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection, 2020, arXiv:1912.02424.

Built: algorithm 1. On every level the k cells nearest to a box's centre are candidates; those whose IoU with the box
reaches the mean plus the standard deviation of all its candidates, and whose centre lies inside it, learn it. Of
several boxes the one with the highest IoU wins. For points, which have no size, the paper takes the IoU of squares of
8 strides about them: ``scale``. The paper speaks of anchors where it has one per cell; of cells with several all are
candidates, as in its authors' code.

Sparse and without a loop over images or boxes: the k nearest cells of a grid lie in a fixed pattern about the nearest
one. A box whose centre no candidate's centre is near enough to, such as one between two points, teaches nothing, as in
the paper; nor does one for which no candidate reaches the threshold, as may be with few levels, where most candidates
of a box between two of them are about as good as the best.

Letters: B images, G boxes of all images, N references of one image, L levels, S shapes (references of one cell, over
all levels), O offsets of the pattern, C candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detseg.targets.lattice import Lattice, pick_best
from detseg.targets.sparse import paired_iou

BACKGROUND = -1


class _Candidates(NamedTuple):
    """(box, reference) pairs.

    Attributes:
        box: ``(C,)`` the row of the box among the G.
        reference: ``(C,)`` the reference within its image.
    """

    box: Tensor
    reference: Tensor


class ATSSAssigner:
    """Give every reference the box that it shall learn, by thresholds that each box sets itself.

    Args:
        k: candidate cells per level; the paper's 9 is "the only hyperparameter", and 7 to 17 do as well (table 4).
        scale: factor of the references' sides when their IoU is computed: 1 for anchors, 8 for the squares of one
            stride that stand for points.

    Raises:
        ValueError: ``k`` below 1, or a ``scale`` that is not positive.
    """

    def __init__(self, *, k: int = 9, scale: float = 1.0) -> None:
        if k < 1 or not scale > 0:
            raise ValueError(f"ATSSAssigner: k is {k} and scale {scale}; k must be at least 1 and scale positive")
        self.k = k
        self.scale = float(scale)

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Assign the boxes of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images.
            image: ``(G,)`` int64, the image of each box.
            batch: the number B of images.
            lattice: the references of one image.

        Returns:
            ``(B, N)`` int64, the row of the box among the G, or -1.
        """
        matched = boxes.new_full((batch * lattice.total,), BACKGROUND, dtype=torch.int64)
        if len(boxes) == 0:
            return matched.view(batch, -1)
        found = self._candidates(boxes, lattice)
        references = lattice.boxes[found.reference]  # (C, 4)
        centre = (references[:, :2] + references[:, 2:]) / 2  # (C, 2)
        iou = paired_iou(boxes[found.box], self._scaled(references, centre))  # (C,)
        own = boxes[found.box]  # (C, 4)
        inside = ((centre > own[:, :2]) & (centre < own[:, 2:])).all(1)  # (C,) line 11
        enough = iou.double() >= _thresholds(iou, found.box, len(boxes))[found.box]  # (C,) line 10
        chosen = (inside & enough & (iou > 0)).nonzero()[:, 0]  # (M,)
        box, iou = found.box[chosen], iou[chosen]  # (M,) each
        cell = image[box] * lattice.total + found.reference[chosen]  # (M,)
        wins = pick_best(cell, iou, box, len(matched)).nonzero()[:, 0]  # (W,)
        matched[cell[wins]] = box[wins]
        return matched.view(batch, -1)

    def _scaled(self, references: Tensor, centre: Tensor) -> Tensor:
        if self.scale == 1.0:
            return references
        half = (references[:, 2:] - references[:, :2]) * (self.scale / 2)  # (C, 2)
        return torch.cat((centre - half, centre + half), dim=1)  # (C, 4)

    def _candidates(self, boxes: Tensor, lattice: Lattice) -> _Candidates:
        """Return the references of the k nearest cells of every level, of all boxes (lines 3 to 6)."""
        shapes = lattice.shapes
        heads = torch.cat((shapes.level.new_ones(1), shapes.level.diff())).nonzero()[:, 0]  # (L,) a level's first shape
        stride = torch.stack((shapes.stride_y, shapes.stride_x), dim=1)[heads]  # (L, 2)
        limit = torch.stack((shapes.rows, shapes.cols), dim=1)[heads]  # (L, 2)
        base = shapes.base[heads]  # (L, 4)
        first = ((base[:, :2] + base[:, 2:]) / 2).flip(1)  # (L, 2) y, x of the first cell
        centre = ((boxes[:, :2] + boxes[:, 2:]) / 2).flip(1)[:, None]  # (G, 1, 2) y, x
        nearest = ((centre - first) / stride - 0.5).ceil()  # (G, L, 2); halves go to the earlier cell
        nearest = torch.minimum(nearest.clamp(min=0), limit - 1).long()
        cell = nearest[:, :, None] + self._pattern(boxes.device)  # (G, L, O, 2) row, column
        away = (first[:, None] + cell * stride[:, None] - centre[:, :, None]).square().sum(-1)  # (G, L, O)
        away = away.masked_fill(((cell < 0) | (cell >= limit[:, None])).any(-1), torch.inf)  # (G, L, O)
        # The pattern is in reading order and the sort stable: of cells equally far the first come first.
        order = away.sort(dim=2, stable=True)
        keep = order.indices[:, :, : self.k]  # (G, L, k)
        box, level, place = order.values[:, :, : self.k].isfinite().nonzero().unbind(1)  # (Q,) each
        row, col = cell[box, level, keep[box, level, place]].unbind(1)  # (Q,) each
        start = shapes.first[heads][level] + (row * limit[level, 1] + col) * shapes.step[heads][level]  # (Q,)
        each = shapes.step[heads][level]  # (Q,) references of a cell
        pair = torch.repeat_interleave(each)  # (C,)
        inner = torch.arange(len(pair), device=pair.device) - (each.cumsum(0) - each)[pair]  # (C,)
        return _Candidates(box[pair], start[pair] + inner)

    def _pattern(self, device: torch.device) -> Tensor:
        """Return in which cells about the nearest one the k nearest lie ``(O, 2)``, in reading order.

        A cell (i, j) away has (|i| + 1)(|j| + 1) - 1 cells between it and the nearest one, all of them no farther.
        """
        span = torch.arange(-self.k + 1, self.k, device=device)  # (2k - 1,)
        offsets = torch.cartesian_prod(span, span).view(-1, 2)  # ((2k - 1)^2, 2)
        return offsets[((offsets.abs() + 1).prod(1) <= self.k).nonzero()[:, 0]]  # (O, 2)

    def __repr__(self) -> str:
        return f"ATSSAssigner(k={self.k}, scale={self.scale})"


def _thresholds(iou: Tensor, box: Tensor, count: int) -> Tensor:
    """Return mean plus standard deviation of the IoUs of each box's candidates ``(G,)`` (lines 7 to 9).

    In double precision the sum of such IoUs is exact, so that equal ones reach their mean. The deviation divides by
    n - 1, as the authors' code does; the paper does not say.
    """
    iou = iou.double()  # (C,)
    number = torch.bincount(box, minlength=count)  # (G,)
    mean = iou.new_zeros(count).index_add_(0, box, iou) / number  # (G,)
    spread = iou.new_zeros(count).index_add_(0, box, (iou - mean[box]).square())  # (G,)
    return mean + (spread / (number - 1).clamp(min=1)).sqrt()
