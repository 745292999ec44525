"""FCOS targets: Tian et al., FCOS: A Simple and Strong Anchor-Free Object Detector, 2020, arXiv:2006.09214.

Built: the assignment of boxes to points with centre sampling and a range of distances per level (section 2.1), the
coding of a box as its four distances from a point (equation 1) and the centreness (equation 3 of the 2019 paper).
The points are the centres of an ``AnchorGenerator``'s squares of one stride, so that points and anchors share code.

Differs from the paper: a point lies at (j * stride, i * stride), the corner of its cell rather than the middle, and
distances are divided by the stride, as torchvision has them, so that its published weights fit. Differs from
torchvision: only the cells that a box can reach are looked at; the result is the same on every point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detseg.targets.lattice import Lattice, Shapes, Spacing, Windows, expand_windows, pick_best, within

_AREA_TOP = 1e8  # px^2; float32 rounds top - area to multiples of 8, and torchvision breaks ties after that rounding


@dataclass(frozen=True)
class CellGrid:
    """References that are the cells themselves: squares of one stride about the points that YOLO predicts from.

    Their centres lie half a stride from those of an ``AnchorGenerator``'s squares.
    """

    def strides(
        self, image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], nominal: Sequence[int]
    ) -> list[Spacing]:
        """Return the pixels between the cells of each level, ``nominal``; see ``References``."""
        return [(stride, stride) for stride in nominal]

    def __call__(
        self, feature_sizes: Sequence[tuple[int, int]], strides: Sequence[Spacing], device: torch.device | str
    ) -> list[Tensor]:
        """Return ``(H * W, 4)`` xyxy pixels per level, by row and column.

        Args:
            feature_sizes: (H, W) of each level.
            strides: (vertical, horizontal) pixels between the cells of each level.
            device: where the squares shall live.
        """
        levels = []
        for (height, width), (down, across) in zip(feature_sizes, strides, strict=True):
            y = torch.arange(height, dtype=torch.float32, device=device) * down  # (H,)
            x = torch.arange(width, dtype=torch.float32, device=device) * across  # (W,)
            rows, cols = torch.meshgrid(y, x, indexing="ij")  # (H, W) each
            level = torch.stack((cols, rows, cols + across, rows + down), dim=-1)  # (H, W, 4)
            levels.append(level.reshape(-1, 4))
        return levels


class DistanceCoder:
    """Boxes as distances (left, top, right, bottom) from a point (FCOS, equation 1).

    Args:
        normalize: divide by the size of the reference, so that every level predicts numbers of the same order.
    """

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        """Return the distances ``(N, 4)`` of ``boxes`` (N, 4) from the centres of ``references`` (N, 4).

        All are positive where the point lies inside its box.
        """
        x, y = _centres(references)  # (N,) each
        x0, y0, x1, y1 = boxes.unbind(-1)  # (N,) each
        distances = torch.stack((x - x0, y - y0, x1 - x, y1 - y), dim=-1)  # (N, 4)
        return distances / _extent(references) if self.normalize else distances

    def decode(self, distances: Tensor, references: Tensor) -> Tensor:
        """Return the boxes ``(N, 4)`` in xyxy pixels; the inverse of ``encode``."""
        references = references.to(distances.dtype)
        if self.normalize:
            distances = distances * _extent(references)
        x, y = _centres(references)  # (N,) each
        left, top, right, bottom = distances.unbind(-1)  # (N,) each
        return torch.stack((x - left, y - top, x + right, y + bottom), dim=-1)  # (N, 4)


def centreness(distances: Tensor) -> Tensor:
    """Return how central a point lies in its box, ``(N,)`` in [0, 1] (FCOS 2019, equation 3).

    Args:
        distances: ``(N, 4)`` left, top, right, bottom; their unit cancels. A point outside its box, which assigners by
            overlap may choose, has a negative one and centreness 0.
    """
    distances = distances.clamp(min=0)  # (N, 4)
    across, down = distances[:, 0::2], distances[:, 1::2]  # (N, 2) each
    least = torch.finfo(distances.dtype).tiny
    return torch.sqrt(across.amin(1) / across.amax(1).clamp(min=least) * (down.amin(1) / down.amax(1).clamp(min=least)))


class PointAssigner:
    """Give every point the smallest box that claims it, or none.

    A box claims a point that lies inside it, is closer to its centre than ``radius`` strides along both axes, and
    whose largest distance to its sides is in the range of the level.

    Args:
        radius: the half side of the central square in strides; ``None`` takes the whole box (FCOS without centre
            sampling).
        reach: the range of a level in strides: the largest distance lies between ``reach[0]`` and ``reach[1]``
            strides; the first level has no lower bound and the last no upper one. The default gives the paper's
            0, 64, 128, 256, 512, infinity at strides 8 to 128.
    """

    def __init__(self, *, radius: float | None = 1.5, reach: tuple[float, float] = (4.0, 8.0)) -> None:
        self.radius = radius
        self.reach = (float(reach[0]), float(reach[1]))

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Assign the boxes of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images.
            image: ``(G,)`` int64, the image of each box.
            batch: the number B of images.
            lattice: the points as squares of one stride, one per cell.

        Returns:
            ``(B, N)`` int64, the row of the box among the G, or -1. Of several boxes the one with the smallest area
            wins, and among equals the first, with areas rounded as torchvision's float32 does.
        """
        box, cells = self.claims(boxes, image, lattice)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # (G,)
        smallness = (_AREA_TOP - area).clamp(min=0)  # (G,)
        matched = boxes.new_full((batch * lattice.total,), -1, dtype=torch.int64)
        wins = pick_best(cells, smallness[box], box, len(matched)).nonzero()[:, 0]  # (W,)
        matched[cells[wins]] = box[wins]
        return matched.view(batch, -1)

    def claims(self, boxes: Tensor, image: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
        """List every (box, point) pair in which the box claims the point, before the smallest box wins.

        Returns:
            ``(C,)`` the row of the box, and ``(C,)`` the point, counted through the batch (image * N + point).
        """
        shapes = lattice.shapes
        side = shapes.base[:, 2] - shapes.base[:, 0]  # (S,)
        lower = torch.where(shapes.level == 0, 0.0, side * self.reach[0])  # (S,)
        upper = torch.where(shapes.level == shapes.level[-1], torch.inf, side * self.reach[1])  # (S,)
        box, shape = self._pairs(boxes, lower, upper)
        span = side * (torch.inf if self.radius is None else self.radius)  # (S,)
        windows = self._windows(boxes[box], span[shape], _take(shapes, shape))
        far_x, far_y = _farthest(boxes, box, span[shape], windows, _take(shapes, shape))
        far = torch.maximum(far_x[windows.col_entry], far_y[windows.row_entry])  # (C,)
        pair = windows.row_owner[windows.row_entry]  # (C,)
        claimed = ((far > lower[shape][pair]) & (far < upper[shape][pair])).nonzero()[:, 0]
        pair = pair[claimed]
        row, col = windows.row[windows.row_entry[claimed]], windows.col[windows.col_entry[claimed]]
        cell = shapes.first[shape][pair] + row * shapes.cols[shape][pair] + col
        return box[pair], image[box[pair]] * lattice.total + cell

    def _pairs(self, boxes: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Pair boxes with levels by size: inside a box the largest distance is between half its side and its side."""
        side = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)  # (G, 1)
        slack = 1.001  # against rounding; the exact test follows
        box, shape = ((side * slack > lower) & (side / 2 < upper * slack)).nonzero().unbind(1)  # (P,) each
        return box, shape

    def _windows(self, boxes: Tensor, span: Tensor, shapes: Shapes) -> Windows:
        """Take the cells between the box's sides and within ``span`` of its centre, rounded outwards."""
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2  # (P, 2)
        low = torch.maximum(boxes[:, :2], centre - span[:, None])  # (P, 2)
        high = torch.minimum(boxes[:, 2:], centre + span[:, None])  # (P, 2)
        stride = torch.stack((shapes.stride_x, shapes.stride_y), dim=1)  # (P, 2)
        limit = torch.stack((shapes.cols, shapes.rows), dim=1)  # (P, 2)
        first, last = within((low / stride).floor(), (high / stride).ceil(), limit)  # (P, 2) each
        return expand_windows((first[:, 1], last[:, 1]), (first[:, 0], last[:, 0]))


def _farthest(boxes: Tensor, box: Tensor, span: Tensor, windows: Windows, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Return along x per column entry, and along y per row entry, the distance to the farther side of the box.

    It is infinite where the point is not inside the box or not close enough to its centre along that axis.
    """
    found = []
    for axis, owner, index, stride in (
        (0, windows.col_owner, windows.col, shapes.stride_x),
        (1, windows.row_owner, windows.row, shapes.stride_y),
    ):
        low, high = boxes[box, axis][owner], boxes[box, axis + 2][owner]  # (E,) each
        point = (index * stride[owner]).to(boxes.dtype)  # (E,)
        before, after = point - low, high - point  # (E,) each
        inside = (torch.minimum(before, after) > 0) & ((point - (low + high) / 2).abs() < span[owner])
        found.append(torch.where(inside, torch.maximum(before, after), torch.inf))
    return found[0], found[1]


def _take(shapes: Shapes, index: Tensor) -> Shapes:
    return Shapes(*(column[index] for column in shapes))


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * (boxes[..., 0] + boxes[..., 2]), 0.5 * (boxes[..., 1] + boxes[..., 3])


def _extent(boxes: Tensor) -> Tensor:
    size = boxes[..., 2:] - boxes[..., :2]  # (N, 2)
    return torch.cat((size, size), dim=-1)  # (N, 4) w, h, w, h
