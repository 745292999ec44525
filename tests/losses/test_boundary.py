from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from detseg.losses import BoundaryLoss, boundary_loss, signed_distances


def test_distances_by_hand():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 255]]])
    found = signed_distances(labels, 3)
    assert found[0, 0, 0].tolist() == [-2, -1, 0, 1, 2, 0]
    assert found[0, 1, 0].tolist() == [3, 2, 1, 0, -1, 0]  # the unlabelled pixel is no pixel of another class
    assert found[0, 2, 0].tolist() == [0] * 6  # nowhere
    assert signed_distances(torch.ones(1, 2, 2, dtype=torch.int64), 2).abs().max() == 0  # everywhere


def test_distances_against_all_pairs():
    labels = torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(3))
    labels[:, 2, 2:5] = 255
    found = signed_distances(labels, 3)
    for image, own in enumerate(labels):
        for label in range(3):
            inside = (own == label).nonzero().double()
            outside = ((own != label) & (own != 255)).nonzero().double()
            for row, column in own.new_tensor([[0, 0], [3, 4], [5, 6]]).tolist():
                place = torch.tensor([[row, column]], dtype=torch.float64)
                here = int(own[row, column]) == label
                away = float(torch.cdist(place, outside if here else inside).min())
                assert float(found[image, label, row, column]) == pytest.approx(1 - away if here else away, abs=1e-4)


def padded(maps: torch.Tensor, value: float) -> torch.Tensor:
    """Frame the last two dimensions by 2 rows above, 5 below, 1 column at the left and 4 at the right."""
    return torch.nn.functional.pad(maps, (1, 4, 2, 5), value=value)


def test_padding_changes_neither_the_distances_of_valid_pixels_nor_the_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
    labels[0, 5:8, :9] = 255  # ignored pixels within
    logits = torch.randn(2, 3, 12, 15, generator=generator)
    framed = padded(labels, 255)
    assert_close(signed_distances(framed, 3), padded(signed_distances(labels, 3), 0), rtol=0, atol=0)
    assert_close(boundary_loss(padded(logits, 9.0), framed), boundary_loss(logits, labels))


def test_ignored_pixels_between_two_classes_belong_to_neither():
    labels = torch.tensor([[[0, 255, 255, 1, 1, 255]]])
    found = signed_distances(labels, 2)
    assert found[0, 0, 0].tolist() == [-2, 0, 0, 3, 4, 0]
    assert found[0, 1, 0].tolist() == [3, 0, 0, -2, -3, 0]


def test_a_class_that_fills_all_valid_pixels_has_no_border():
    labels = torch.ones(2, 6, 7, dtype=torch.int64)
    labels[0, 4:], labels[1, :, :2] = 255, 255
    assert_close(signed_distances(labels, 3), torch.zeros(2, 3, 6, 7), rtol=0, atol=0)
    assert float(boundary_loss(torch.randn(2, 3, 6, 7), labels)) == 0


def test_the_loss_is_the_mean_of_probability_times_distance():
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0] = math.log(3)  # 3/4 and 1/4
    labels = torch.tensor([[[0, 0, 1, 255]]])
    # class 0: -1, 0, 1; class 1: 2, 1, 0
    assert_close(boundary_loss(logits, labels), torch.tensor((0.75 * 0 + 0.25 * 3) / 2 / 3))
    only = BoundaryLoss(classes=[1], weight=2.0)(logits, labels)["loss_boundary"]
    assert_close(only, torch.tensor(2 * 0.25 * 3 / 3))


def test_moving_towards_the_truth_lowers_it():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[:, 3:6, 3:6] = 1
    values = []
    for shift in (0, 1, 3):
        guess = labels.roll(shift, dims=2)
        values.append(float(boundary_loss(20.0 * torch.stack([1 - guess, guess], dim=1), labels)))
    assert values[0] < values[1] < values[2]
    assert values[0] < 0


def test_gradient():
    logits = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 0, 1], [0, 1, 1], [255, 1, 0]]])
    assert torch.autograd.gradcheck(lambda x: boundary_loss(x, labels), logits)
