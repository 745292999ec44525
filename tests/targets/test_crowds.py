import torch
from torch.testing import assert_close

from detseg.structures import Target
from detseg.targets.crowds import inside_crowd, learnable

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60], [5, 5, 5, 9]])


def target(crowds: list[bool]) -> Target:
    return Target(boxes=BOXES, labels=torch.tensor([0, 1, 2]), iscrowd=torch.tensor(crowds))


def test_crowds_and_boxes_without_area_teach_nothing() -> None:
    assert learnable(target([False, True, False])).labels.tolist() == [0]
    assert learnable(target([False, False, False])).labels.tolist() == [0, 1]


def test_nothing_to_drop_returns_the_same_target() -> None:
    whole = target([False, False, False])[:2]
    assert learnable(whole) is whole


def test_inside_is_the_share_of_the_box_not_of_the_crowd() -> None:
    boxes = torch.tensor([[25.0, 25, 30, 30], [10, 20, 30, 30], [100, 0, 120, 9]])
    inside = inside_crowd(boxes, target([False, True, False]), 0.7)
    assert inside is not None
    assert_close(inside, torch.tensor([True, False, False]))
    half = inside_crowd(boxes, target([False, True, False]), 0.5)
    assert half is not None and half.tolist() == [True, True, False]


def test_no_crowd_costs_nothing() -> None:
    assert inside_crowd(BOXES, target([False, False, False]), 0.7) is None
