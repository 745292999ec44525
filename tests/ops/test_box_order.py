from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from detseg.ops.box_order import chance_order, spread_order


def some_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner, side = rng.integers(0, 200, (count, 2)), rng.integers(1, 80, (count, 2))
    return np.unique(np.concatenate([corner, corner + side], axis=1), axis=0)


@given(st.permutations(range(12)))
def test_the_order_depends_on_the_boxes_alone(rows: list[int]) -> None:
    boxes = some_boxes(12)
    shuffled = boxes[rows]
    assert boxes[chance_order(boxes)].tolist() == shuffled[chance_order(shuffled)].tolist()
    expected = boxes[spread_order(boxes, duplicate=0.5)].tolist()
    assert expected == shuffled[spread_order(shuffled, duplicate=0.5)].tolist()


def test_every_row_appears_once_and_the_first_are_a_fair_sample() -> None:
    boxes = some_boxes(20_000)
    order = chance_order(boxes)
    assert sorted(order.tolist()) == list(range(len(boxes)))
    first = boxes[order[: len(boxes) // 10]]
    for column in range(4):  # the mean of 2,000 of these numbers is off by 1.3 at one standard deviation
        assert abs(first[:, column].mean() - boxes[:, column].mean()) < 5


def test_another_coordinate_is_another_place() -> None:
    # The rows differ in one coordinate each, up to the largest: a hash that loses any would leave them in their order.
    boxes = np.array([[0, 0, 65535, 65535 - i] for i in range(64)] + [[i, 0, 65535, 65535] for i in range(1, 64)])
    order = chance_order(boxes)
    assert sorted(order.tolist()) == list(range(127))
    assert (np.diff(order) == 1).sum() < 10


def test_near_duplicates_come_last() -> None:
    boxes = some_boxes(400)
    order = spread_order(boxes, duplicate=0.6)
    sorted_boxes = torch.from_numpy(boxes[order]).float()
    overlap = box_iou(sorted_boxes, sorted_boxes).tril(diagonal=-1)  # with earlier ones
    alike = (overlap > 0.6).any(dim=1)
    assert sorted(order.tolist()) == list(range(len(boxes))) and 0 < int(alike.sum()) < len(boxes) // 2
    assert int(alike.nonzero()[0]) == int((~alike).sum())  # unlike all before, then the rest, each in order of chance
    place = np.empty(len(boxes), dtype=int)
    place[chance_order(boxes)] = np.arange(len(boxes))
    for part in (order[(~alike).numpy()], order[alike.numpy()]):
        assert (np.diff(place[part]) > 0).all()


def test_no_boxes() -> None:
    none = np.zeros((0, 4), dtype=np.int64)
    assert chance_order(none).shape == (0,) and spread_order(none, duplicate=0.8).shape == (0,)
