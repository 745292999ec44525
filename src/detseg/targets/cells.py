"""Which cell of a grid answers for an object: that which its centre falls into.

Redmon et al. 2016, arXiv:1506.02640, section 2. A cell answers for one object; of several the largest is kept, of equal
ones the first. The paper is silent about it, and its code keeps one at random.

Letters: B images, G objects of all images, N cells of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detseg.targets.lattice import pick_best


def centre_cells(boxes: Tensor, stride: Tensor, limit: Tensor) -> Tensor:
    """Return column and row ``(G, 2)`` int64 of the cell under each box's centre; outside the grid, the nearest one.

    Args:
        boxes: ``(G, 4)`` xyxy pixels.
        stride: ``(2,)`` or ``(G, 2)``, pixels per cell along x and y.
        limit: ``(2,)`` or ``(G, 2)`` int64, columns and rows of the grid.
    """
    cell = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride).floor()  # (G, 2)
    return torch.minimum(cell.clamp(min=0), limit - 1).long()  # cut as floats: one beyond 2^63 has no integer


def keep_largest(boxes: Tensor, place: Tensor, size: int) -> Tensor:
    """Return the object of each of ``size`` places ``(size,)`` int64: of several the largest box, of none -1.

    Args:
        boxes: ``(G, 4)`` xyxy pixels.
        place: ``(G,)`` int64 in [0, size), what each object claims.
        size: the number of places.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).float()  # (G,)
    owner = torch.arange(len(boxes), device=boxes.device)  # (G,)
    wins = pick_best(place, area, owner, size).nonzero()[:, 0]  # (W,)
    found = torch.full((size,), -1, dtype=torch.int64, device=boxes.device)
    found[place[wins]] = wins
    return found


def cell_objects(boxes: Tensor, image: Tensor, batch: int, grid: tuple[int, int], stride: int) -> Tensor:
    """Return the object of each cell ``(B, N)`` int64, a row of ``boxes``, or -1; cells count row by row.

    Args:
        boxes: ``(G, 4)`` xyxy pixels, of all images.
        image: ``(G,)`` int64, the image of each box.
        batch: the number B of images.
        grid: (rows, columns).
        stride: pixels per cell.
    """
    rows, columns = grid
    limit = torch.tensor([columns, rows], device=boxes.device)  # (2,)
    column, row = centre_cells(boxes, limit.new_full((2,), stride), limit).unbind(1)  # (G,) each
    place = (image * rows + row) * columns + column  # (G,)
    return keep_largest(boxes, place, batch * rows * columns).view(batch, -1)
