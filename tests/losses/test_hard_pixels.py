from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detseg.losses import FocalMapLoss, HardPixelLoss, cross_entropy, focal_cross_entropy, hard_pixels


def two_classes(*likely: float) -> torch.Tensor:
    """Return logits ``(1, 2, 1, W)`` that give class 0 the wanted probabilities."""
    first = torch.tensor(likely).logit()
    return torch.stack([first, torch.zeros_like(first)])[None, :, None]


def test_hard_pixels_by_hand():
    logits = two_classes(0.9, 0.6, 0.3, 0.8, 0.1)
    labels = torch.tensor([[[0, 0, 0, 255, 1]]])  # true class has 0.9, 0.6, 0.3, -, 0.9
    assert hard_pixels(logits, labels, threshold=0.7, least=0.0).tolist() == [[[False, True, True, False, False]]]
    assert hard_pixels(logits, labels, threshold=0.0, least=0.25).tolist() == [[[False, False, True, False, False]]]
    assert hard_pixels(logits, labels, threshold=0.0, least=0.0).any().item() is False
    assert hard_pixels(logits, labels, threshold=0.4, least=0.5).tolist() == [[[False, True, True, False, False]]]


def test_mining_is_the_mean_over_the_hard_pixels():
    logits = two_classes(0.9, 0.6, 0.3, 0.8)
    labels = torch.tensor([[[0, 0, 0, 255]]])
    value = HardPixelLoss(threshold=0.7, least=0.0)(logits, labels)["loss_cross_entropy"]
    assert_close(value, torch.tensor(-(math.log(0.6) + math.log(0.3)) / 2))
    everything = HardPixelLoss(threshold=1.0, least=1.0, weight=2.0)(logits, labels)["loss_cross_entropy"]
    assert_close(everything, 2 * cross_entropy(logits, labels))


def test_mining_takes_weights_of_classes_and_pixels():
    logits, labels = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (1, 4, 5))
    weights, pixels = torch.tensor([1.0, 2.0, 3.0]), torch.rand(1, 4, 5) + 1
    ours = HardPixelLoss(threshold=1.0, class_weights=[1.0, 2.0, 3.0])(logits, labels, pixels)["loss_cross_entropy"]
    assert_close(ours, cross_entropy(logits, labels, class_weights=weights, pixel_weights=pixels))


def test_focal_loss_by_hand_and_as_cross_entropy():
    logits, labels = two_classes(0.9, 0.5, 0.2), torch.tensor([[[0, 0, 255]]])
    expected = -(0.1**2 * math.log(0.9) + 0.5**2 * math.log(0.5)) / 2
    assert_close(focal_cross_entropy(logits, labels), torch.tensor(expected))
    logits, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    assert_close(focal_cross_entropy(logits, labels, gamma=0.0), F.cross_entropy(logits, labels))


def test_a_focused_loss_has_finite_slopes_where_all_is_right():
    logits = torch.tensor([[[[80.0]], [[-80.0]]]], requires_grad=True)
    for gamma in (0.5, 2.0):
        loss = focal_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.int64), gamma=gamma)
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0.0
        assert slope.isfinite().all()


def test_focal_gradient():
    logits = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1, 2], [2, 255, 0]]])
    assert torch.autograd.gradcheck(lambda x: focal_cross_entropy(x, labels, gamma=1.5), logits)


def test_errors():
    with pytest.raises(ValueError, match="threshold 2 and least"):
        HardPixelLoss(threshold=2)
    with pytest.raises(ValueError, match="gamma -1"):
        FocalMapLoss(gamma=-1)
    with pytest.raises(ValueError, match="HardPixelLoss has 3 class weights, but the model has 2 classes; give one"):
        HardPixelLoss(class_weights=[1.0, 2.0, 3.0])(two_classes(0.5), torch.zeros(1, 1, 1, dtype=torch.int64))
