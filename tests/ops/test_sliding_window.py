from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch

from detseg.ops.proposer import Proposer
from detseg.ops.sliding_window import SlidingWindow, count_windows


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (5, 4), (0, 7)])
def test_all_boxes_are_counted(height: int, width: int) -> None:
    lines = itertools.product(range(height + 1), range(height + 1), range(width + 1), range(width + 1))
    assert count_windows(height, width) == sum(top < bottom and left < right for top, bottom, left, right in lines)


def test_a_photo_has_billions() -> None:
    assert count_windows(375, 500) == 375 * 376 // 2 * (500 * 501 // 2) == 8_830_125_000
    with pytest.raises(ValueError, match="-1 x 3"):
        count_windows(-1, 3)


def test_grid_by_hand() -> None:
    # Windows of 4 x 4 every 2 px in 9 x 7: 1 px is over below, shared as 0 above; 3 rows (0, 2, 4), 2 columns (0, 2)
    # with 1 px over at the right. One of 8 wide x 2 high is cut to the width 7 and stands at y = 0.5 -> 0, 1, ...
    found = SlidingWindow(scales=[4], ratios=[1.0], stride=0.5).windows(9, 7)
    expected = {(x, y, x + 4, y + 4) for x in (0, 2) for y in (0, 2, 4)}
    assert len(found) == 6 and {tuple(box) for box in found.tolist()} == expected
    cut = SlidingWindow(scales=[4], ratios=[0.25], stride=0.5).windows(9, 7)
    assert {tuple(box) for box in cut.tolist()} == {(0, y, 7, y + 2) for y in range(8)}


def test_scales_are_roots_of_areas_and_ratios_height_over_width() -> None:
    found = SlidingWindow(scales=[20, 40], ratios=[0.5, 2.0], stride=1.0).windows(200, 200)
    width, height = (found[:, 2] - found[:, 0]), (found[:, 3] - found[:, 1])
    shapes = set(zip(height.tolist(), width.tolist(), strict=True))
    assert shapes == {(14, 28), (28, 14), (28, 57), (57, 28)}
    for h, w in shapes:
        assert min(abs(math.sqrt(h * w) - scale) for scale in (20, 40)) < 0.5


@pytest.mark.parametrize("height, width", [(128, 128), (37, 201), (16, 16), (300, 20)])
def test_inside_unique_and_the_same_again(height: int, width: int) -> None:
    windows = SlidingWindow()
    found = windows(torch.zeros((3, height, width), dtype=torch.uint8))
    assert found.dtype == torch.float32 and len(found) > 0
    assert len(found.unique(dim=0)) == len(found)
    assert (found[:, :2] >= 0).all() and (found[:, 2:] > found[:, :2]).all()
    assert (found[:, 2] <= width).all() and (found[:, 3] <= height).all()
    assert torch.equal(found, pickle.loads(pickle.dumps(windows)).windows(height, width))
    few = SlidingWindow(limit=10).windows(height, width)
    assert torch.equal(few, found[:10])


def test_an_image_smaller_than_every_window_has_none() -> None:
    found = SlidingWindow(scales=[16])(torch.zeros((3, 5, 7), dtype=torch.uint8))
    assert found.shape == (0, 4) and found.dtype == torch.float32
    assert SlidingWindow(scales=[16], ratios=[1.0]).windows(20, 15).tolist() != []  # too wide alone: cut to the width


def test_key_names_every_parameter() -> None:
    windows = SlidingWindow(scales=[32], ratios=[1], stride=0.5, limit=7)
    assert isinstance(windows, Proposer)
    assert windows.key == "SlidingWindow(scales=[32.0], ratios=[1.0], stride=0.5, limit=7) version 1"
    keys = {SlidingWindow(**{name: value}).key for name, value in
            {"scales": [9], "ratios": [3], "stride": 0.1, "limit": 5}.items()}  # fmt: skip
    assert len(keys | {SlidingWindow().key}) == 5


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"scales": []}, "give some"),
        ({"ratios": [0]}, "above 0"),
        ({"stride": 0}, "stride=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_numbers_outside_their_range(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SlidingWindow(**wrong)
