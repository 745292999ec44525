from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from detseg.losses import connected_regions, separation_weights


def columns(*spans: tuple[int, int], width: int = 12) -> torch.Tensor:
    masks = torch.zeros(len(spans), 3, width, dtype=torch.bool)
    for mask, (first, last) in zip(masks, spans, strict=True):
        mask[:, first:last] = True
    return masks


def test_equation_2_between_two_cells():
    weights = separation_weights(columns((0, 3), (5, 12)))
    # columns 3 and 4 lie between: distances (1, 2) and (2, 1)
    expected = 1 + 10 * math.exp(-9 / 50)
    assert_close(weights[1], torch.tensor([1.0] * 3 + [expected] * 2 + [1.0] * 7))


def test_the_two_nearest_cells_count_in_any_order():
    spans = [(0, 1), (4, 5), (11, 12)]
    weights = separation_weights(columns(*spans), strength=2.0, sigma=3.0)
    expected = 1 + 2 * math.exp(-((1 + 5) ** 2) / 18)  # column 10: 1 to the last cell, 6 to the middle one -> 7
    assert_close(weights[0, 9], torch.tensor(1 + 2 * math.exp(-((2 + 5) ** 2) / 18)))
    assert_close(weights[0, 2], torch.tensor(1 + 2 * math.exp(-((2 + 2) ** 2) / 18)))
    assert weights[0, 2] > expected > weights[0, 9]
    assert_close(weights, separation_weights(columns(*reversed(spans)), strength=2.0, sigma=3.0))


def test_fewer_than_two_cells_weigh_nothing():
    assert_close(separation_weights(columns((2, 5))), torch.ones(3, 12))
    assert_close(separation_weights(columns()), torch.ones(3, 12))
    assert_close(separation_weights(columns((2, 5), (7, 7))), torch.ones(3, 12))  # the second one is empty


def test_regions_of_each_class_are_told_apart():
    labels = torch.tensor([[1, 1, 0, 2, 2], [0, 0, 1, 0, 255], [0, 0, 0, 0, 2]])
    found = connected_regions(labels)
    drawn = {tuple(map(tuple, mask.nonzero().tolist())) for mask in found}
    assert drawn == {((0, 0), (0, 1), (1, 2)), ((0, 3), (0, 4)), ((2, 4),)}  # corners join
    assert connected_regions(torch.full((2, 3), 255)).shape == (0, 2, 3)
