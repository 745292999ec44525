from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from detseg.losses.focal import FocalLoss, focal_loss, negative_share


def _case(rows: int = 40, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 4).requires_grad_()
    return logits, torch.randint(-2, classes, (rows,)), torch.rand(rows, dtype=torch.float64)


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    target = torch.zeros(len(labels), classes, dtype=torch.float64)
    positive = labels >= 0
    target[positive, labels[positive]] = 1.0
    return target


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 2.0), (0.5, 0.0), (0.3, 1.5)])
def test_loss_and_gradient_equal_torchvisions(alpha: float, gamma: float) -> None:
    logits, labels, weights = _case()
    ours = focal_loss(logits, labels, weights, alpha=alpha, gamma=gamma)
    entries = sigmoid_focal_loss(logits, _one_hot(labels, 5), alpha=alpha, gamma=gamma)
    theirs = (entries * weights[:, None]).sum()
    assert_close(ours, theirs)
    (own,) = torch.autograd.grad(ours * 3, logits)
    (their,) = torch.autograd.grad(theirs * 3, logits)
    assert_close(own, their)
    assert_close(focal_loss(logits, labels, alpha=alpha, gamma=gamma), entries.sum())


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits, labels, weights = _case(6, 3)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, weights), (logits,))


def test_ignored_references_have_neither_loss_nor_gradient() -> None:
    logits, labels, _ = _case()
    weights = (labels != -2).double()
    loss = focal_loss(logits, labels, weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = labels != -2
    assert_close(loss, focal_loss(logits[kept], labels[kept]))
    assert bool((gradient[~kept] == 0).all()) and bool((gradient[kept] != 0).all())


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0]))
    loss.backward()
    assert_close(loss.item(), 0.25 * 200 + 0.75 * 200)  # the second row is wrong twice
    assert logits.grad is not None
    assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.75]]))


def test_half_precision_is_summed_in_single() -> None:
    logits, labels, _ = _case()
    half = logits.detach().to(torch.bfloat16).requires_grad_()
    loss = FocalLoss()(half, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    assert_close(loss, FocalLoss()(half.detach().float(), labels))


def test_no_references_and_no_positives() -> None:
    assert focal_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0
    # p = 0.5 everywhere: 0.75 * 0.25 * log 2 per entry
    loss = focal_loss(torch.zeros(2, 3), torch.tensor([-1, -1]))
    assert_close(loss.item(), 6 * 0.75 * 0.25 * 0.6931472, rtol=1e-6, atol=0)


def test_easy_negatives_share_of_the_loss() -> None:
    logits = torch.tensor([[-4.0, 3.0], [-4.0, -4.0]])
    labels = torch.tensor([-1, 1])
    entries = sigmoid_focal_loss(logits, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    share = negative_share(FocalLoss().entries(logits, labels), logits, labels)
    assert_close(share, (entries[0, 0] + entries[1, 0]) / entries.sum())


def test_wrong_shapes_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\), \(5,\), None"):
        focal_loss(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        FocalLoss(alpha=1.5)


def test_the_sum_of_many_references_keeps_its_digits() -> None:
    logits = torch.full((200_000, 8), -4.0)
    labels = torch.full((200_000,), -1)
    found = focal_loss(logits, labels, torch.ones(200_000))
    wanted = focal_loss(logits[:1].double(), labels[:1]) * 200_000
    assert_close(found.double(), wanted, rtol=2e-6, atol=0)
