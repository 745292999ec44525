from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.losses.heatmap import HeatmapFocalLoss, heatmap_focal_loss


def _case() -> tuple[Tensor, Tensor, Tensor]:
    logits = (torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3).requires_grad_()
    heat = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    heat[torch.rand(heat.shape) < 0.2] = 1.0
    return logits, heat, torch.rand(2, 4, 5) < 0.3


def _loop(logits: Tensor, heat: Tensor, ignored: Tensor | None, alpha: float, beta: float) -> float:
    total, logits = 0.0, logits.detach()
    for b, k, y, x in itertools.product(*(range(size) for size in logits.shape)):
        p, value = 1 / (1 + math.exp(-float(logits[b, k, y, x]))), float(heat[b, k, y, x])
        if value == 1:
            total -= (1 - p) ** alpha * math.log(p)
        elif ignored is None or not bool(ignored[b, y, x]):
            total -= (1 - value) ** beta * p**alpha * math.log(1 - p)
    return total


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 4.0), (1.5, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize("with_ignored", [False, True])
def test_equals_equation_1_cell_by_cell(alpha: float, beta: float, with_ignored: bool) -> None:
    logits, heat, ignored = _case()
    masked = ignored if with_ignored else None
    found = heatmap_focal_loss(logits, heat, masked, alpha=alpha, beta=beta)
    assert_close(found.item(), _loop(logits, heat, masked, alpha, beta), rtol=1e-10, atol=0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits, heat, ignored = _case()
    assert torch.autograd.gradcheck(lambda x: heatmap_focal_loss(x, heat, ignored), (logits,))


def test_by_hand() -> None:
    # p = 0.5 everywhere: the object costs 0.25 log 2, a cell at heat 0.5 a sixteenth of that, the last one nothing
    heat = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    ignored = torch.tensor([[[True, False, True]]])  # an object counts in a crowd too
    loss = heatmap_focal_loss(torch.zeros(1, 1, 1, 3), heat, ignored)
    assert_close(loss.item(), 0.25 * math.log(2) * (1 + 1 / 16), rtol=1e-6, atol=0)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[[200.0, -200.0, 200.0]]]], requires_grad=True)
    loss = heatmap_focal_loss(logits, torch.tensor([[[[1.0, 1.0, 0.0]]]]))
    loss.backward()
    assert logits.grad is not None
    assert_close(loss.item(), 400.0)
    assert_close(logits.grad, torch.tensor([[[[0.0, -1.0, 1.0]]]]))


def test_half_precision_is_summed_in_single() -> None:
    logits, heat, _ = _case()
    half = logits.detach().to(torch.bfloat16).requires_grad_()
    loss = HeatmapFocalLoss()(half, heat.float())
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    assert_close(loss, heatmap_focal_loss(half.detach().float(), heat.float()))


def test_wrong_shapes_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\), \(1, 2, 3, 4\), None"):
        heatmap_focal_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"beta -1\.0"):
        HeatmapFocalLoss(beta=-1.0)
