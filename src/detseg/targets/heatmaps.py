"""Gaussian heatmaps: where a detector of keypoints shall see a peak, and how close beside it an answer is still good.

Law and Deng 2018, `"CornerNet: Detecting Objects as Paired Keypoints" <https://arxiv.org/abs/1808.01244>`_, section 3.2
(the radius from a least overlap), and Zhou, Wang and Kraehenbuehl 2019, `"Objects as Points"
<https://arxiv.org/abs/1904.07850>`_, section 3 (a spread that goes with the size of the object, and the larger value
where Gaussians of one class overlap). Only the cells of each object's window are touched, those of all objects at once.

Differs: the radius is the exact one of the paper's condition, where the published codes divide two of the three roots
by the wrong number and get larger radii. As in those codes the radius is cut to whole cells, the Gaussian ends there,
and its sigma is a third of the radius and half a cell. Boxes are cut to the image before anything else.

Letters: B images, G objects of all images, K classes, H and W rows and columns of a map, P planes (image and class),
C cells of all windows, Q objects that own their cell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detseg.ops.boxes import clip_boxes, large_enough
from detseg.structures import Target
from detseg.targets.crowds import MIN_SIDE, inside_crowd, learnable
from detseg.targets.lattice import expand_windows, pick_best, within

CROWD_OVERLAP = 0.5  # share of a cell inside a crowd region from which it teaches nothing


class CellObjects(NamedTuple):
    """The objects of a batch, measured in cells of a map.

    Attributes:
        boxes: ``(G, 4)`` float32 xyxy in cells, cut to the image.
        labels: ``(G,)`` int64.
        image: ``(G,)`` int64, ascending.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor


def objects_in_cells(targets: list[Target], image_size: tuple[int, int], stride: int, like: Tensor) -> CellObjects:
    """Return what a batch has to teach: no crowds, and nothing without area inside the image.

    Args:
        targets: one per image.
        image_size: (height, width) of the padded images, in pixels.
        stride: pixels per cell.
        like: any tensor on the wanted device.
    """
    taught = [learnable(target) for target in targets]
    counts = torch.tensor([len(target) for target in taught], device=like.device)  # (B,)
    boxes = torch.cat([target.boxes for target in taught]).to(like.device, torch.float32)  # (G, 4)
    boxes = clip_boxes(boxes, torch.tensor(image_size, device=like.device))  # (G, 4)
    keep = large_enough(boxes, MIN_SIDE).nonzero()[:, 0]  # (G',)
    labels = torch.cat([target.labels for target in taught]).to(like.device)  # (G,)
    return CellObjects(boxes[keep] / stride, labels[keep], torch.repeat_interleave(counts)[keep])


def cells_of(points: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the cell ``(G, 2)`` int64 as (column, row) in which each point ``(G, 2)`` (x, y, in cells) lies.

    A point on the right or lower border of the map of ``shape`` (rows, columns) belongs to its last column or row.
    """
    last = torch.tensor([shape[1] - 1, shape[0] - 1], device=points.device)  # (2,)
    return torch.minimum(points.floor().long(), last)


def overlap_radius(sides: Tensor, min_overlap: float) -> Tensor:
    """Return how far both corners of a box may be off, along each axis, so that the IoU stays at ``min_overlap``.

    The smallest of three cases (CornerNet, figure 5): both corners shifted alike, both inwards, both outwards. Each is
    a root of a quadratic, written so that nothing cancels.

    Args:
        sides: ``(G, 2)`` width and height, positive; the radius has their unit.
        min_overlap: IoU in (0, 1).

    Returns:
        ``(G,)``.
    """
    width, height = sides.unbind(-1)  # (G,) each
    around, area, lost = width + height, width * height, 1 - min_overlap
    slope = around.square()  # (G,)
    ratio = lost / (1 + min_overlap)
    shifted = 2 * ratio * area / (around + (slope - 4 * ratio * area).clamp(min=0).sqrt())  # (w-r)(h-r) = 2t/(1+t) wh
    inside = lost * area / (around + (slope - 4 * lost * area).clamp(min=0).sqrt())  # (w - 2r)(h - 2r) = t wh
    ratio = lost / min_overlap
    outside = ratio * area / (around + (slope + 4 * ratio * area).sqrt())  # (w + 2r)(h + 2r) = wh / t
    return torch.minimum(torch.minimum(shifted, inside), outside)


def draw_gaussians(cells: Tensor, radius: Tensor, plane: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Draw a Gaussian with value 1 at each cell; where several overlap the largest value stays.

    Args:
        cells: ``(G, 2)`` int64 (column, row), inside the map.
        radius: ``(G,)`` cells around it that are drawn, cut to whole ones; sigma is (2 * radius + 1) / 6.
        plane: ``(G,)`` int64 which of the maps.
        shape: (P, H, W).

    Returns:
        ``(P, H, W)`` of the type of ``radius``, in [0, 1].
    """
    planes, height, width = shape
    reach = radius.floor()  # (G,)
    limit = torch.tensor([width, height], device=cells.device)  # (2,)
    first, last = within(cells - reach[:, None], cells + reach[:, None], limit)  # (G, 2) each
    windows = expand_windows((first[:, 1], last[:, 1]), (first[:, 0], last[:, 0]))
    scale = -0.5 / ((2 * reach + 1) / 6).square()  # (G,)
    down = windows.row - cells[windows.row_owner, 1]  # (Pr,)
    across = windows.col - cells[windows.col_owner, 0]  # (Pc,)
    down_part = (down.square() * scale[windows.row_owner]).exp()  # (Pr,)
    across_part = (across.square() * scale[windows.col_owner]).exp()  # (Pc,)
    value = down_part[windows.row_entry] * across_part[windows.col_entry]  # (C,)
    start = (plane[windows.row_owner] * height + windows.row) * width  # (Pr,)
    index = start[windows.row_entry] + windows.col[windows.col_entry]  # (C,)
    heat = value.new_zeros(planes * height * width)
    return heat.scatter_reduce_(0, index, value, "amax").view(shape)


def own_cells(objects: CellObjects, cells: Tensor, batch: int, shape: tuple[int, int]) -> Tensor:
    """Return the objects ``(Q,)`` that say what is regressed at their cell, whatever their class.

    Of several in one cell it is the one with the smallest area, and of equals the first.

    Args:
        objects: of the batch.
        cells: ``(G, 2)`` int64 (column, row) of each object, inside the map.
        batch: the number B of images.
        shape: (rows, columns) of the map.
    """
    height, width = shape
    index = (objects.image * height + cells[:, 1]) * width + cells[:, 0]  # (G,)
    area = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)  # (G,)
    order = torch.arange(len(index), device=index.device)  # (G,)
    return pick_best(index, 1 / (1 + area), order, batch * height * width).nonzero()[:, 0]


def crowd_cells(targets: list[Target], shape: tuple[int, int], stride: int, like: Tensor) -> Tensor | None:
    """Return which cells lie in a crowd region, ``(B, H, W)`` bool, or ``None`` where no image has one.

    Args:
        targets: one per image.
        shape: (rows, columns) of the map.
        stride: pixels per cell.
        like: any tensor on the wanted device.
    """
    if not any(bool(target.iscrowd.any()) for target in targets):
        return None
    rows, cols = (torch.arange(count, device=like.device, dtype=torch.float32) * stride for count in shape)
    corners = torch.cartesian_prod(rows, cols).flip(1)  # (H * W, 2) as x, y
    squares = torch.cat([corners, corners + stride], dim=1)  # (H * W, 4)
    inside = [inside_crowd(squares, target, CROWD_OVERLAP) for target in targets]  # B x (H * W,) or None
    none = squares.new_zeros(len(squares), dtype=torch.bool)  # (H * W,)
    return torch.stack([none if cells is None else cells for cells in inside]).view(-1, *shape)


class GaussianHeatmaps:
    """Heatmaps with one Gaussian per keypoint, as wide as the object allows.

    Args:
        min_overlap: IoU in (0, 1) that a box still has when its corners are off by the radius; CornerNet takes 0.3,
            CenterNet's published code 0.7.

    Raises:
        ValueError: ``min_overlap`` is out of range.
    """

    def __init__(self, *, min_overlap: float = 0.7) -> None:
        if not 0.0 < min_overlap < 1.0:
            raise ValueError(f"GaussianHeatmaps: min_overlap is {min_overlap}; an IoU in (0, 1) is wanted, such as 0.7")
        self.min_overlap = min_overlap

    def __call__(self, objects: CellObjects, cells: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Return heatmaps ``(B, K, H, W)`` in [0, 1], exactly 1 at the cells of objects.

        Args:
            objects: of the batch.
            cells: ``(G, 2)`` int64 (column, row) of their keypoints.
            shape: (B, K, H, W).
        """
        batch, classes, height, width = shape
        radius = overlap_radius(objects.boxes[:, 2:] - objects.boxes[:, :2], self.min_overlap)  # (G,)
        plane = objects.image * classes + objects.labels  # (G,)
        return draw_gaussians(cells, radius, plane, (batch * classes, height, width)).view(shape)

    def __repr__(self) -> str:
        return f"GaussianHeatmaps(min_overlap={self.min_overlap})"
