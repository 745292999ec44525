from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.losses import SquaredError
from detseg.losses.squared import squared_error


def test_equals_torchs_sum_and_weighs_rows() -> None:
    prediction, target = torch.randn(5, 4), torch.randn(5, 4)
    assert_close(squared_error(prediction, target), F.mse_loss(prediction, target, reduction="sum"))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0])
    rows = sum(
        float(w) * F.mse_loss(p, t, reduction="sum") for w, p, t in zip(weights, prediction, target, strict=True)
    )
    assert_close(SquaredError()(prediction, target, weights), rows)


def test_by_hand_and_of_nothing() -> None:
    value = squared_error(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 2, 5, 4]]), torch.tensor([3.0]))
    assert float(value) == 3 * (1 + 4)
    empty = torch.zeros((0, 4), requires_grad=True)
    loss = squared_error(empty, torch.zeros((0, 4)), torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0 and empty.grad is not None
