from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.losses import ClassSoftmaxLoss, GridBoxLoss, LogisticLoss


def test_squared_by_hand() -> None:
    """sigmoid(0) = 0.5 against 0.75 and 0.5; log ratios 1 and -2 against 0."""
    loss = GridBoxLoss(offset="squared")(torch.tensor([[0.0, 0, 1, -2]]), torch.tensor([[0.75, 0.5, 0, 0]]))
    assert_close(loss, torch.tensor(0.0625 + 1 + 4))


def test_the_gradient_of_cross_entropy_is_prediction_minus_truth() -> None:
    numbers = torch.randn(6, 4, requires_grad=True)
    wanted = torch.cat([torch.rand(6, 2), torch.randn(6, 2)], dim=1)
    weights = torch.rand(6)
    GridBoxLoss(offset="cross_entropy")(numbers, wanted, weights).backward()
    assert numbers.grad is not None
    assert_close(numbers.grad[:, :2], (numbers.detach()[:, :2].sigmoid() - wanted[:, :2]) * weights[:, None])
    assert_close(numbers.grad[:, 2:], 2 * (numbers.detach()[:, 2:] - wanted[:, 2:]) * weights[:, None])


def test_classes_equal_torchs_losses_row_by_row() -> None:
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0]), torch.rand(5)
    softmax = sum(
        w * F.cross_entropy(row[None], label[None]) for w, row, label in zip(weights, logits, labels, strict=True)
    )
    assert_close(ClassSoftmaxLoss()(logits, labels, weights), softmax)
    one_hot = torch.eye(3)[labels]
    logistic = F.binary_cross_entropy_with_logits(logits, one_hot, weights[:, None].expand(5, 3), reduction="sum")
    assert_close(LogisticLoss()(logits, labels, weights), logistic)
    assert_close(LogisticLoss()(logits, labels), F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum"))


@pytest.mark.parametrize("loss", [GridBoxLoss(offset="squared"), GridBoxLoss(offset="cross_entropy")])
def test_no_boxes_keep_the_graph(loss: GridBoxLoss) -> None:
    numbers = torch.zeros((0, 4), requires_grad=True)
    value = loss(numbers, torch.zeros((0, 4)), torch.zeros(0))
    value.backward()
    assert value.item() == 0 and numbers.grad is not None


@pytest.mark.parametrize("loss", [ClassSoftmaxLoss(), LogisticLoss()])
def test_no_rows_and_one_class(loss: ClassSoftmaxLoss | LogisticLoss) -> None:
    labels = torch.zeros(0, dtype=torch.int64)
    assert loss(torch.zeros((0, 1)), labels, torch.zeros(0)).item() == 0
    assert bool(loss(torch.randn(2, 1), torch.zeros(2, dtype=torch.int64)).isfinite())


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="offset is 'l1'"):
        GridBoxLoss(offset="l1")  # type: ignore[arg-type]
