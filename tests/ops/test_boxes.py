import math

import torch
from torch.testing import assert_close
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from detseg.ops.boxes import clip_boxes, intersection_over_first, large_enough


def test_clip_equals_torchvision_for_one_and_for_many() -> None:
    boxes = torch.randn(2, 30, 4) * 100
    sizes = torch.tensor([[40, 60], [90, 20]])
    batch = clip_boxes(boxes, sizes)
    for image in range(2):
        expected = clip_boxes_to_image(boxes[image], tuple(sizes[image].tolist()))
        assert_close(batch[image], expected)
        assert_close(clip_boxes(boxes[image], sizes[image]), expected)


def test_clip_ends_infinity() -> None:
    boxes = torch.tensor([[-math.inf, 2.0, math.inf, math.inf]])
    assert clip_boxes(boxes, torch.tensor([30, 50])).tolist() == [[0, 2, 50, 30]]


def test_large_enough_equals_torchvision_and_drops_nan() -> None:
    boxes = torch.rand(100, 4) * 4
    assert_close(large_enough(boxes, 1.0).nonzero().flatten(), remove_small_boxes(boxes, 1.0))
    assert not large_enough(torch.tensor([[0.0, 0.0, math.nan, 5.0], [0.0, 0.0, math.inf, 5.0]]), 0.0).any()


def test_intersection_over_first_by_hand() -> None:
    first = torch.tensor([[0.0, 0, 10, 10], [3, 3, 3, 9]])
    second = torch.tensor([[5.0, 0, 100, 100], [20, 20, 30, 30]])
    assert_close(intersection_over_first(first, second), torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
