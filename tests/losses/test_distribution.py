from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.losses.distribution import DistributionFocalLoss, distribution_focal_loss, expectation


def _two_hot(value: float, bins: int, low: float, high: float) -> list[float]:
    """Return the probabilities that put ``value`` between its two neighbours, one number at a time."""
    step = (high - low) / (bins - 1)
    return [max(0.0, 1 - abs(value - (low + index * step)) / step) for index in range(bins)]


@pytest.mark.parametrize(("bins", "low", "high"), [(16, 0.0, 15.0), (9, -2.0, 2.0), (2, 0.0, 1.0)])
def test_the_expectation_gives_back_what_two_neighbours_say(bins: int, low: float, high: float) -> None:
    values = torch.rand(50, 4, dtype=torch.float64) * (high - low) + low
    values[0] = torch.tensor([low, high, low, high])
    rows = [[_two_hot(value, bins, low, high) for value in row] for row in values.tolist()]
    logits = torch.tensor(rows, dtype=torch.float64).clamp(min=1e-300).log()
    assert_close(expectation(logits, low=low, high=high), values)
    assert_close(DistributionFocalLoss(bins=bins, low=low, high=high).expectation(logits.flatten(1)), values)
    # There the loss is the entropy, and its slope is zero: nothing predicts the two better.
    free = logits.detach().clamp(min=-50).requires_grad_()
    loss = distribution_focal_loss(free, values, low=low, high=high)
    loss.backward()
    assert free.grad is not None
    assert_close(free.grad, torch.zeros_like(free), rtol=0, atol=1e-12)


def test_by_hand() -> None:
    logits = torch.zeros(1, 4, 3)  # a third each, of 0, 1, 2
    assert_close(expectation(logits, low=0.0, high=2.0), torch.ones(1, 4))
    target = torch.tensor([[0.25, 1.0, 1.5, 2.0]])
    assert_close(distribution_focal_loss(logits, target, low=0.0, high=2.0).item(), math.log(3))
    logits[0, 0, 1] = math.log(2)  # 1/4, 1/2, 1/4
    first = -(0.75 * math.log(1 / 4) + 0.25 * math.log(1 / 2))
    wanted = (first + 3 * math.log(3)) / 4
    assert_close(distribution_focal_loss(logits, target, low=0.0, high=2.0).item(), wanted)
    weights = torch.tensor([0.5])
    assert_close(distribution_focal_loss(logits, target, weights, low=0.0, high=2.0).item(), wanted / 2)


def test_the_loss_is_a_cross_entropy_with_its_gradient() -> None:
    loss = DistributionFocalLoss(bins=7, low=0.0, high=6.0)
    logits = torch.randn(5, 4 * 7, dtype=torch.float64, requires_grad=True)
    target, weights = torch.rand(5, 4, dtype=torch.float64) * 6, torch.rand(5, dtype=torch.float64)
    truth = torch.tensor([[_two_hot(value, 7, 0.0, 6.0) for value in row] for row in target.tolist()])
    cross = -(truth * logits.view(5, 4, 7).log_softmax(-1)).sum(-1).mean(1)
    assert_close(loss(logits, target, weights), (cross * weights).sum())
    assert torch.autograd.gradcheck(lambda x: loss(x, target, weights), (logits,))


@pytest.mark.parametrize("beyond", [-3.0, 40.0, math.inf])
def test_a_target_outside_of_the_range_counts_as_its_end(beyond: float) -> None:
    loss, logits = DistributionFocalLoss(bins=17), torch.randn(1, 4 * 17)
    end: Tensor = torch.full((1, 4), 0.0 if beyond < 0 else 16.0)
    assert_close(loss(logits, torch.full((1, 4), beyond)), loss(logits, end))


def test_no_boxes_keep_the_graph_and_wrong_numbers_are_refused() -> None:
    none = torch.zeros(0, 4 * 17, requires_grad=True)
    loss = DistributionFocalLoss()(none, torch.zeros(0, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and none.grad is not None
    with pytest.raises(ValueError, match=r"1 bins from 0\.0 to 16\.0"):
        DistributionFocalLoss(bins=1)
    with pytest.raises(ValueError, match=r"17 bins from 3 to 3"):
        DistributionFocalLoss(low=3, high=3)
