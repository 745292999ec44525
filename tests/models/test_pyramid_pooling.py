import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models.pyramid_pooling import PyramidPooling
from detseg.models.region_features import RegionPool, stack_regions


def bins_by_hand(level: Tensor, box: list[float], stride: int, count: int) -> list[list[list[float]]]:
    """The maximum of every bin of one region of a map (C, H, W): plain loops over cells."""
    left, top, right, bottom = (math.floor(value / stride + 0.5) for value in box)
    width, height = max(right - left + 1, 1), max(bottom - top + 1, 1)
    values = [[[0.0] * count for _ in range(count)] for _ in range(len(level))]
    for channel, row, column in [(c, r, k) for c in range(len(level)) for r in range(count) for k in range(count)]:
        cells = [
            float(level[channel, y, x])
            for y in range(top + math.floor(row * height / count), top + math.ceil((row + 1) * height / count))
            for x in range(left + math.floor(column * width / count), left + math.ceil((column + 1) * width / count))
            if 0 <= y < level.shape[1] and 0 <= x < level.shape[2]
        ]
        values[channel][row][column] = max(cells, default=0.0)
    return values


REGIONS = torch.tensor([[0.0, 0, 63, 63], [10, 4, 30, 50], [16, 16, 24, 24], [40, 8, 64, 64], [5, 5, 6, 6]])


def test_every_level_by_hand() -> None:
    level = torch.randn(1, 3, 16, 16)
    pooling = PyramidPooling(bins=(6, 3, 2, 1))
    found = pooling([level], stack_regions([REGIONS]), [4])
    assert found.shape == (5, 3 * 50) == (5, *pooling.shape(3))
    for row, box in enumerate(REGIONS.tolist()):
        expected = [torch.tensor(bins_by_hand(level[0], box, 4, count)).flatten() for count in (6, 3, 2, 1)]
        assert_close(found[row], torch.cat(expected))


def test_two_by_two_cells_by_hand() -> None:
    level = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]]])
    found = PyramidPooling(bins=(2, 1))([level], torch.tensor([[0.0, 0, 0, 3, 3], [0, 1, 1, 2, 2]]), [1])
    assert found.tolist() == [[6, 8, 14, 16, 16], [6, 7, 10, 11, 11]]


def test_a_pyramid_of_one_level_is_fast_rcnns_pooling() -> None:
    """Fast R-CNN, section 2.1: RoIPool is the pyramid with one level; the convolutions are shared by both."""
    level, regions = torch.randn(2, 5, 16, 16), stack_regions([REGIONS, REGIONS[:2]])
    one = PyramidPooling(bins=(7,))([level], regions, [4])
    assert_close(one, RegionPool(output_size=7)([level], regions, [4]).flatten(1), rtol=0, atol=0)


def test_gradients_reach_the_map_and_no_regions_are_fine() -> None:
    level = torch.randn(1, 3, 8, 8, requires_grad=True)
    PyramidPooling()([level], torch.tensor([[0.0, 0, 0, 8, 8]]), [1]).sum().backward()
    assert level.grad is not None and level.grad.abs().sum() > 0
    assert PyramidPooling(bins=(2,))([level], torch.zeros(0, 5), [1]).shape == (0, 12)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one level"):
        PyramidPooling(bins=())
    with pytest.raises(ValueError, match=r"bins is \[2, 0\]"):
        PyramidPooling(bins=(2, 0))
    with pytest.raises(ValueError, match="reads one map, but the backbone gives 2"):
        PyramidPooling()([torch.zeros(1, 1, 4, 4)] * 2, torch.zeros(0, 5), [4, 8])
