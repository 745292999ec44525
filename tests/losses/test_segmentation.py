from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.losses import SegmentationLoss, cross_entropy, dice_loss, dice_scores


@pytest.fixture
def maps():
    logits = torch.randn(2, 4, 6, 5)
    labels = torch.randint(0, 4, (2, 6, 5))
    labels[0, :2] = 255
    return logits, labels


def test_cross_entropy_equals_torch(maps):
    logits, labels = maps
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5])
    for given in (None, weights):
        expected = nn.CrossEntropyLoss(weight=given, ignore_index=255)(logits, labels)
        assert_close(cross_entropy(logits, labels, class_weights=given), expected)


def test_half_precision_is_summed_in_single():
    logits = torch.randn(1, 3, 64, 65).bfloat16()
    labels = torch.randint(0, 3, (1, 64, 65))
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, cross_entropy(logits.float(), labels), rtol=0, atol=0)


def test_cross_entropy_is_the_mean_over_the_batch_not_over_images():
    logits = torch.zeros(2, 2, 1, 4)
    logits[0, 0] = math.log(3)  # probabilities 3/4, 1/4
    labels = torch.tensor([[[0, 255, 255, 255]], [[0, 1, 0, 1]]])
    assert_close(cross_entropy(logits, labels), torch.tensor((-math.log(0.75) + 4 * math.log(2)) / 5))


def test_pixel_weights_as_if_a_pixel_were_there_twice(maps):
    logits, labels = maps
    twice = cross_entropy(torch.cat([logits, logits[1:]]), torch.cat([labels, labels[1:]]))
    weights = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 6, 5)
    assert_close(cross_entropy(logits, labels, pixel_weights=weights), twice)


def test_dice_by_hand():
    logits = torch.tensor([[[[20.0, -20.0, 20.0, 0.0]], [[-20.0, 20.0, -20.0, 0.0]]]])  # p0 = 1, 0, 1, 1/2
    labels = torch.tensor([[[0, 0, 1, 255]]])
    assert_close(dice_scores(logits, labels, smooth=0.0), torch.tensor([2 * 1 / (2 + 2), 0.0]), atol=1e-6, rtol=0)
    assert_close(dice_scores(logits, labels, smooth=1.0), torch.tensor([3 / 5, 1 / 3]), atol=1e-6, rtol=0)
    assert_close(dice_loss(logits, labels, smooth=1.0), torch.tensor(1 - (3 / 5 + 1 / 3) / 2), atol=1e-6, rtol=0)


def test_a_class_that_is_nowhere_scores_one():
    logits = torch.full((1, 3, 2, 2), -30.0)
    logits[:, 0] = 30.0
    assert_close(dice_scores(logits, torch.zeros(1, 2, 2, dtype=torch.int64)), torch.ones(3))


def test_ignored_pixels_change_nothing_and_give_no_gradient(maps):
    logits, labels = maps
    other = logits.clone()
    other[0, :, :2] += 5 * torch.randn(4, 2, 5)
    other.requires_grad_(True)
    loss = SegmentationLoss(cross_entropy=1.0, dice=1.0)
    for name, value in loss(other, labels).items():
        assert_close(value, loss(logits, labels)[name])
    sum(loss(other, labels).values()).backward()
    assert other.grad[0, :, :2].abs().max() == 0
    assert other.grad[0, :, 2:].abs().min() > 0


def test_nothing_valid_is_zero_and_finite():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    terms = SegmentationLoss(dice=1.0, class_weights=[1, 2, 3])(logits, torch.full((1, 4, 4), 255))
    assert {name: value.item() for name, value in terms.items()} == {"loss_cross_entropy": 0.0, "loss_dice": 0.0}
    sum(terms.values()).backward()
    assert logits.grad.abs().max() == 0


def test_factors_choose_the_terms(maps):
    assert list(SegmentationLoss()(*maps)) == ["loss_cross_entropy"]
    assert list(SegmentationLoss(cross_entropy=0.0, dice=1.0)(*maps)) == ["loss_dice"]
    single, double = SegmentationLoss(dice=1.0)(*maps), SegmentationLoss(cross_entropy=3.0, dice=2.0)(*maps)
    assert_close(double["loss_dice"], 2 * single["loss_dice"])
    assert_close(double["loss_cross_entropy"], 3 * single["loss_cross_entropy"])
    assert SegmentationLoss(class_weights=[1.0, 2.0]).state_dict() == {}


def test_errors(maps):
    with pytest.raises(ValueError, match="one must be above 0"):
        SegmentationLoss(cross_entropy=0.0)
    with pytest.raises(ValueError, match="has 2 class weights, but the model has 4 classes"):
        SegmentationLoss(class_weights=[1.0, 2.0])(*maps)
