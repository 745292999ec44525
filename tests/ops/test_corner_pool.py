from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.ops.corner_pool import bottom_right_pool, running_max, top_left_pool


def _loop(columns: Tensor, rows: Tensor, *, top_left: bool) -> Tensor:
    """Equations 6 and 7: the recursion, cell by cell."""
    height, width = rows.shape[2:]
    down, across = columns.clone(), rows.clone()
    step = 1 if top_left else -1
    for y in reversed(range(height)) if top_left else range(height):
        for x in reversed(range(width)) if top_left else range(width):
            if 0 <= y + step < height:
                down[:, :, y, x] = torch.maximum(down[:, :, y, x], down[:, :, y + step, x])
            if 0 <= x + step < width:
                across[:, :, y, x] = torch.maximum(across[:, :, y, x], across[:, :, y, x + step])
    return down + across


@pytest.mark.parametrize(("pool", "top_left"), [(top_left_pool, True), (bottom_right_pool, False)])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 2)])
def test_equals_the_recursion_of_the_paper(
    pool: Callable[[Tensor, Tensor], Tensor], top_left: bool, size: tuple[int, int]
) -> None:
    columns, rows = torch.randint(-3, 4, (2, 2, 3, *size)).float()  # many equal values
    assert_close(pool(columns, rows), _loop(columns, rows, top_left=top_left), rtol=0, atol=0)


@pytest.mark.parametrize("pool", [top_left_pool, bottom_right_pool])
def test_the_gradient_is_that_of_finite_differences(pool: Callable[[Tensor, Tensor], Tensor]) -> None:
    maps = tuple(torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(pool, maps)


def test_the_gradient_goes_to_where_the_maximum_stands() -> None:
    row = torch.tensor([2.0, 1.0, 3.0, 0.0], requires_grad=True)
    seen = running_max(row, 0, reverse=True)
    assert seen.tolist() == [3.0, 3.0, 3.0, 0.0]
    seen.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert row.grad is not None and row.grad.tolist() == [0.0, 0.0, 111.0, 1000.0]
    assert running_max(row.detach(), 0, reverse=False).tolist() == [2.0, 2.0, 3.0, 3.0]


def test_a_corner_sees_the_far_sides_of_its_box() -> None:
    """A top-left corner at (1, 1) lights up from the left side's lowest and the top side's rightmost cell."""
    left_side, top_side = torch.zeros(2, 1, 1, 5, 6)
    left_side[..., 4, 1], top_side[..., 1, 5] = 1.0, 1.0
    found = top_left_pool(left_side, top_side)[0, 0]
    assert (found == 2).nonzero().tolist() == [[1, 1]]
    found = bottom_right_pool(left_side, top_side)[0, 0]
    assert float(found.max()) == 1.0
