from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.losses.focal import FocalLoss, negative_share
from detseg.losses.quality import (
    BCELoss,
    EntrywiseLoss,
    QualityFocalLoss,
    VarifocalLoss,
    bce_loss,
    quality_focal_loss,
    varifocal_loss,
)

LOSSES = [BCELoss(), QualityFocalLoss(), QualityFocalLoss(beta=1.0), VarifocalLoss()]


def _case(rows: int = 40, classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits (R, K), labels, weights and quality (R,) each, in double precision."""
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(-2, classes, (rows,))
    return logits, labels, torch.rand(rows, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)


def _target(labels: Tensor, quality: Tensor, classes: int) -> Tensor:
    """Return the soft one-hot target (R, K), written row by row."""
    target = torch.zeros(len(labels), classes, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        if label >= 0:
            target[row, label] = quality[row]
    return target


def _twin(loss: EntrywiseLoss, logits: Tensor, target: Tensor) -> Tensor:
    """The formulas of the papers on the dense target (R, K)."""
    p = logits.sigmoid()
    cross = -(target * p.log() + (1 - target) * (1 - p).log())
    if isinstance(loss, QualityFocalLoss):
        return (target - p).abs() ** loss.beta * cross
    if isinstance(loss, VarifocalLoss):
        return torch.where(target > 0, target * cross, loss.alpha * p**loss.gamma * cross)
    return cross


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_loss_and_gradient_equal_the_formula_on_dense_targets(loss: EntrywiseLoss) -> None:
    logits, labels, weights, quality = _case()
    ours = loss(logits, labels, weights, quality)
    entries = _twin(loss, logits, _target(labels, quality, 5))
    theirs = (entries * weights[:, None]).sum()
    assert_close(ours, theirs)
    (own,), (their,) = torch.autograd.grad(ours * 3, logits), torch.autograd.grad(theirs * 3, logits)
    assert_close(own, their)
    assert_close(loss.entries(logits, labels, quality), entries)
    assert_close(loss(logits, labels), _twin(loss, logits, _target(labels, torch.ones(40), 5)).sum())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_gradient_is_that_of_finite_differences(loss: EntrywiseLoss) -> None:
    logits, labels, weights, quality = _case(6, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weights, quality), (logits,))


def test_cross_entropy_is_torchs_and_focal_loss_without_focus() -> None:
    logits, labels, weights, _ = _case()
    ones = torch.ones(40, dtype=torch.float64)
    target = _target(labels, ones, 5)
    wanted = F.binary_cross_entropy_with_logits(logits, target, weights[:, None].expand(40, 5), reduction="sum")
    assert_close(bce_loss(logits, labels, weights), wanted)
    assert_close(FocalLoss(alpha=0.5, gamma=0.0)(logits, labels, weights) * 2, wanted)
    assert_close(quality_focal_loss(logits, labels, weights, beta=0.0), wanted)
    assert_close(varifocal_loss(logits, labels, weights, alpha=1.0, gamma=0.0), wanted)


def test_by_hand() -> None:
    logits = torch.zeros(1, 2)  # p = 1/2
    labels, quality = torch.tensor([1]), torch.tensor([0.75])
    log2 = math.log(2)
    assert_close(quality_focal_loss(logits, labels, quality=quality).item(), (0.25 + 0.0625) * log2)
    assert_close(varifocal_loss(logits, labels, quality=quality).item(), (0.75 * 0.25 + 0.75) * log2)
    assert_close(bce_loss(logits, labels, quality=quality).item(), 2 * log2)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_extreme_logits_stay_finite_and_the_target_itself_is_flat(loss: EntrywiseLoss) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    total = loss(logits, torch.tensor([0, -1]), quality=torch.tensor([0.5, 0.5]))
    total.backward()
    assert math.isfinite(float(total.detach())) and logits.grad is not None and bool(logits.grad.isfinite().all())
    right = torch.tensor([[0.3]], requires_grad=True)
    loss(right, torch.tensor([0]), quality=right.detach().sigmoid()[:, 0]).backward()
    assert_close(right.grad, torch.zeros(1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_ignored_references_half_precision_and_no_references(loss: EntrywiseLoss) -> None:
    logits, labels, _, quality = _case()
    kept = labels != -2
    part = loss(logits, labels, kept.double(), quality)
    assert_close(part, loss(logits[kept], labels[kept], quality=quality[kept]))
    assert bool((torch.autograd.grad(part, logits)[0][~kept] == 0).all())
    half = logits.detach().to(torch.bfloat16)
    assert loss(half, labels).dtype == torch.float32
    none = torch.zeros(0, 3, requires_grad=True)
    empty = loss(none, torch.zeros(0, dtype=torch.int64))
    empty.backward()
    assert float(empty.detach()) == 0.0 and none.grad is not None


def test_the_share_of_easy_negatives_falls_with_focus() -> None:
    logits = torch.full((1000, 2), -4.0)
    logits[0, 1] = -1.0
    labels = torch.full((1000,), -1)
    labels[0] = 1
    shares = [negative_share(loss.entries(logits, labels), logits, labels) for loss in (BCELoss(), FocalLoss())]
    p, q = torch.tensor([-4.0, -1.0]).sigmoid().tolist()
    negatives = -1999 * math.log(1 - p)
    assert_close(float(shares[0]), negatives / (negatives - math.log(q)))
    assert shares[1] < 0.2 * shares[0]


def test_wrong_shapes_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bce_loss: .*\(4, 3\), \(5,\), None"):
        bce_loss(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4,\), \(3,\)"):
        bce_loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match=r"beta is 0\.5"):
        QualityFocalLoss(beta=0.5)
    with pytest.raises(ValueError, match=r"alpha is -1"):
        VarifocalLoss(alpha=-1.0)
