"""Priors of given width and height on a grid, which object learns which of them, and boxes as offsets from cells.

Redmon & Farhadi, YOLO9000, 2017, arXiv:1612.08242, section 2 (dimension clusters, direct location prediction), and
YOLOv3, 2018, arXiv:1804.02767, section 2.1.

A prior stands at the middle of its cell. Which prior has an object is decided by shape alone, as in the papers' code:
the cell is that of the object's centre, so the place is the cell's affair.

Letters: B images, G objects of all images, N priors of one image, S shapes over all levels, L levels, A priors of a
cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detseg.ops.size_clusters import size_iou
from detseg.targets.cells import centre_cells, keep_largest
from detseg.targets.lattice import Lattice, Spacing, expand_windows, within
from detseg.targets.matchers import BETWEEN
from detseg.targets.sparse import SparseIoUMatcher, paired_iou

_EDGE = 1e-4  # of a cell: offsets nearer to its border are taken for this, whose logit is 9.2
_MIN_SIDE = 1e-3  # pixels; a degenerate box must not give an infinite target


class PriorGrid:
    """Boxes of given sizes at the middle of every cell of every level.

    Args:
        sizes: per level, finest first, the (width, height) in pixels of each prior; ``detseg anchors`` finds them.

    Raises:
        ValueError: a level is empty, or a size is not a pair of positive numbers.
    """

    def __init__(self, *, sizes: Sequence[Sequence[Sequence[float]]]) -> None:
        for level, pairs in enumerate(sizes):
            if not len(pairs) or any(len(pair) != 2 or min(pair) <= 0 for pair in pairs):
                raise ValueError(
                    f"PriorGrid: level {level} has sizes {[list(pair) for pair in pairs]}; "
                    "give each prior as [width, height], both positive, and at least one per level"
                )
        self.sizes = tuple(tuple((float(width), float(height)) for width, height in level) for level in sizes)

    def num_anchors(self) -> list[int]:
        """Return A, the priors per cell, of each level."""
        return [len(level) for level in self.sizes]

    def strides(
        self, image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], nominal: Sequence[int]
    ) -> list[Spacing]:
        """Return the pixels between the cells of each level, ``nominal``; see ``References``."""
        return [(stride, stride) for stride in nominal]

    def __call__(
        self, feature_sizes: Sequence[tuple[int, int]], strides: Sequence[Spacing], device: torch.device | str
    ) -> list[Tensor]:
        """Return the priors of each level ``(H * W * A, 4)`` float32 xyxy pixels, by row, column, prior.

        Args:
            feature_sizes: (H, W) of each level.
            strides: (vertical, horizontal) pixels between the cells of each level.
            device: where the priors shall live.

        Raises:
            ValueError: the number of levels is not the one that the sizes were given for.
        """
        if not len(feature_sizes) == len(strides) == len(self.sizes):
            raise ValueError(
                f"PriorGrid: sizes are given for {len(self.sizes)} levels, but the features have {len(feature_sizes)} "
                f"and the strides {len(strides)}; give one list of sizes per level"
            )
        levels = []
        for (rows, columns), (down, across), pairs in zip(feature_sizes, strides, self.sizes, strict=True):
            y = (torch.arange(rows, device=device) + 0.5) * down  # (H,)
            x = (torch.arange(columns, device=device) + 0.5) * across  # (W,)
            middle = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 1, 2)  # (H * W, 1, 2)
            half = torch.tensor(pairs, device=device) / 2  # (A, 2)
            levels.append(torch.cat([middle - half, middle + half], dim=-1).reshape(-1, 4))
        return levels

    def __repr__(self) -> str:
        return f"PriorGrid(sizes={self.sizes})"


class GridCoder:
    """Boxes as (t_x, t_y, t_w, t_h): the centre by a sigmoid within its cell, the sides as powers of e of the prior's.

    b_x = sigmoid(t_x) + c_x and b_w = p_w exp(t_w) (YOLO9000, section 2; YOLOv3, figure 2), so a box never leaves the
    cell that answers for it.

    Args:
        clip: largest t_w and t_h that ``decode`` believes; log(1000 / 16), a 16-pixel prior grown to 1000.
    """

    def __init__(self, *, clip: float = math.log(1000.0 / 16)) -> None:
        self.clip = clip

    def offsets(self, boxes: Tensor, priors: Tensor, stride: Tensor) -> Tensor:
        """Return what the sigmoids and logs shall become ``(N, 4)``: offsets in the cell, and log ratios of the sides.

        Args:
            boxes: ``(N, 4)`` xyxy pixels, their centres in the cells of the priors; those outside count at the border.
            priors: ``(N, 4)`` xyxy pixels, at the middle of their cells.
            stride: ``(N, 2)``, pixels per cell along x and y.
        """
        middle, side = _centre_side(priors)  # (N, 2) each
        centre, wanted = _centre_side(boxes)  # (N, 2) each
        place = ((centre - middle) / stride + 0.5).clamp(0, 1)  # (N, 2)
        growth = (wanted.clamp(min=_MIN_SIDE) / side).log()  # (N, 2)
        return torch.cat([place, growth], dim=1)  # (N, 4)

    def encode(self, boxes: Tensor, priors: Tensor, stride: Tensor) -> Tensor:
        """Return t ``(N, 4)`` such that ``decode`` gives ``boxes`` back; arguments as of ``offsets``.

        A centre on the border of its cell would need an infinite t; it is moved inwards by 1e-4 of the cell.
        """
        wanted = self.offsets(boxes, priors, stride)  # (N, 4)
        return torch.cat([wanted[:, :2].logit(eps=_EDGE), wanted[:, 2:]], dim=1)  # (N, 4)

    def decode(self, numbers: Tensor, priors: Tensor, stride: Tensor) -> Tensor:
        """Return boxes ``(..., 4)`` xyxy pixels of t ``(..., 4)`` about priors ``(..., 4)``, broadcast."""
        middle, side = _centre_side(priors.to(numbers.dtype))  # (..., 2) each
        centre = middle + (numbers[..., :2].sigmoid() - 0.5) * stride  # (..., 2)
        half = numbers[..., 2:].clamp(max=self.clip).exp() * side / 2  # (..., 2)
        return torch.cat([centre - half, centre + half], dim=-1)  # (..., 4)


class PriorAssigner:
    """Give each object the prior of the best shape, over all levels, in the cell under its centre.

    Every object has one prior at most (YOLOv3, section 2.1). Where several want the same, the largest gets it, of equal
    ones the first, and the others are not learnt.

    Args:
        ignore: IoU with an object from which a prior that has none is no background either, 0.5 in YOLOv3;
            ``None``: all others are background.
    """

    def __init__(self, *, ignore: float | None) -> None:
        self.ignore = ignore
        self._near = (
            None if ignore is None else SparseIoUMatcher(positive=ignore, negative=ignore, allow_low_quality=False)
        )

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Assign the boxes of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images, those of one image side by side.
            image: ``(G,)`` int64 ascending, the image of each box.
            batch: the number B of images.
            lattice: the priors of one image.

        Returns:
            ``(B, N)`` int64: the row of the box among the G, -1 for background or -2 for neither.
        """
        shapes = lattice.shapes
        base = shapes.base[:, 2:] - shapes.base[:, :2]  # (S, 2)
        best = size_iou(boxes[:, 2:] - boxes[:, :2], base).argmax(dim=1)  # (G,)
        stride = torch.stack([shapes.stride_x, shapes.stride_y], dim=1)[best]  # (G, 2)
        limit = torch.stack([shapes.cols, shapes.rows], dim=1)[best]  # (G, 2)
        column, row = centre_cells(boxes, stride, limit).unbind(1)  # (G,) each
        prior = shapes.first[best] + (row * shapes.cols[best] + column) * shapes.step[best]  # (G,)
        matched = keep_largest(boxes, image * lattice.total + prior, batch * lattice.total).view(batch, -1)  # (B, N)
        if self._near is None:
            return matched
        near = self._near(boxes, image, batch, lattice) >= 0  # (B, N)
        return matched.masked_fill(near & (matched < 0), BETWEEN)

    def __repr__(self) -> str:
        return f"PriorAssigner(ignore={self.ignore})"


def prior_strides(lattice: Lattice) -> Tensor:
    """Return pixels per cell along x and y of each reference ``(N, 2)``."""
    shapes = lattice.shapes
    counts = torch.tensor(lattice.counts, device=shapes.level.device)  # (L,)
    first = torch.searchsorted(shapes.level, torch.arange(len(counts), device=shapes.level.device))  # (L,)
    stride = torch.stack([shapes.stride_x, shapes.stride_y], dim=1)[first]  # (L, 2)
    return torch.repeat_interleave(stride, counts, dim=0)  # (N, 2)


def covering(boxes: Tensor, objects: Tensor, image: Tensor, lattice: Lattice, least: float) -> Tensor:
    """Say which predicted boxes have an IoU above ``least`` with an object of their image, ``(B, N)`` bool.

    A predicted centre lies in its cell. Where the IoU is t or more, the overlap along x has a share of t of either
    width, so the centres differ by (1 - t) / t of the object's width at most: other cells are not looked at.

    Args:
        boxes: ``(B, N, 4)`` xyxy pixels, of ``GridCoder.decode``.
        objects: ``(G, 4)`` xyxy pixels, of all images.
        image: ``(G,)`` int64, the image of each object.
        lattice: the priors of one image.
        least: in [0, 1).
    """
    found = torch.zeros(boxes.shape[0] * boxes.shape[1], dtype=torch.bool, device=boxes.device)  # (B * N,)
    predicted, shapes = boxes.flatten(0, 1), lattice.shapes
    stride = torch.stack([shapes.stride_x, shapes.stride_y], dim=1)  # (S, 2)
    limit = torch.stack([shapes.cols, shapes.rows], dim=1)  # (S, 2)
    for part in torch.split(torch.arange(len(objects), device=boxes.device), 256):  # bounds the memory of pairs
        middle, side = _centre_side(objects[part, None])  # (g, 1, 2) each
        reach = side * ((1 - least) / max(least, _EDGE)) + _EDGE * stride  # (g, S, 2)
        low, high = ((middle - reach) / stride).floor(), ((middle + reach) / stride).floor()  # (g, S, 2) each
        first, last = (edge.flatten(0, 1) for edge in within(low, high, limit))  # (g * S, 2) each
        windows = expand_windows((first[:, 1], last[:, 1]), (first[:, 0], last[:, 0]))
        owner, shape = windows.row_owner // len(stride), windows.row_owner % len(stride)  # (R,) each
        own = part[owner]  # (R,)
        start = image[own] * lattice.total + shapes.first[shape] + windows.row * (shapes.cols * shapes.step)[shape]
        across = windows.col * shapes.step[windows.col_owner % len(stride)]  # (E,)
        cell = start[windows.row_entry] + across[windows.col_entry]  # (C,)
        iou = paired_iou(predicted[cell], objects[own[windows.row_entry]].to(predicted))  # (C,)
        found[cell[iou > least]] = True
    return found.view(boxes.shape[:2])


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low
