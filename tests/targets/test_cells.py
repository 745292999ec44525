from __future__ import annotations

import torch
from torch import Tensor

from detseg.targets.cells import cell_objects, centre_cells, keep_largest


def slow(boxes: Tensor, image: Tensor, batch: int, grid: tuple[int, int], stride: int) -> Tensor:
    """One box after the other; a later one takes a cell only where it is larger."""
    found = torch.full((batch, grid[0] * grid[1]), -1)
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        column = min(max(int((x0 + x1) / 2 // stride), 0), grid[1] - 1)
        row = min(max(int((y0 + y1) / 2 // stride), 0), grid[0] - 1)
        owner = int(found[image[index], row * grid[1] + column])
        if owner >= 0:
            left, top, right, bottom = boxes[owner].tolist()
            if (x1 - x0) * (y1 - y0) <= (right - left) * (bottom - top):
                continue
        found[image[index], row * grid[1] + column] = index
    return found


def test_equal_to_one_box_after_the_other() -> None:
    low = torch.randint(-10, 90, (300, 2)).float()
    boxes = torch.cat([low, low + torch.randint(1, 40, (300, 2))], dim=1)
    image = torch.randint(0, 4, (300,)).sort().values
    for grid in ((4, 6), (1, 1), (7, 7)):
        found = cell_objects(boxes, image, 5, grid, 16)
        assert torch.equal(found, slow(boxes, image, 5, grid, 16))
        assert int((found[4] >= 0).sum()) == 0  # the last image has no object


def test_of_two_in_a_cell_the_larger_stays_and_of_equals_the_first() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 10, 10], [1, 1, 11, 11], [20, 0, 24, 4]])
    assert cell_objects(boxes, torch.zeros(4, dtype=torch.int64), 1, (1, 2), 16).tolist() == [[1, 3]]
    assert keep_largest(boxes, torch.tensor([2, 0, 2, 2]), 4).tolist() == [1, -1, 2, -1]


def test_borders_belong_to_the_later_cell_and_the_last_one_takes_what_lies_beyond() -> None:
    boxes = torch.tensor([[12.0, 12, 20, 20], [-50, -50, -40, -40], [1e30, 0, 1e30, 2], [30, 30, 34, 34]])
    cells = centre_cells(boxes, torch.tensor([16, 16]), torch.tensor([2, 2]))
    assert cells.tolist() == [[1, 1], [0, 0], [1, 0], [1, 1]]


def test_no_objects() -> None:
    assert cell_objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, (2, 3), 8).tolist() == [[-1] * 6] * 2
