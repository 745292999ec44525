from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou

from detseg.losses.iou import CIoULoss, DIoULoss, GIoULoss, IoULoss


def _pairs() -> tuple[Tensor, Tensor]:
    corner, side = torch.rand(2, 20, 2) * 50, torch.rand(2, 20, 2) * 40 + 5
    first, second = torch.cat([corner, corner + side], dim=2)
    return first, second


@pytest.mark.parametrize(
    ("loss", "measure"),
    [
        (GIoULoss(), generalized_box_iou),
        (DIoULoss(), distance_box_iou),
        (CIoULoss(), complete_box_iou),
    ],
)
def test_losses_are_one_less_the_measure(loss: nn.Module, measure: object) -> None:
    first, second = _pairs()
    assert callable(measure)
    wanted = 1 - measure(first, second).diagonal()
    assert_close(loss(first, second), wanted.sum(), rtol=1e-4, atol=1e-4)
    weights = torch.rand(20)
    assert_close(loss(first, second, weights), (wanted * weights).sum(), rtol=1e-4, atol=1e-4)


def test_unitbox_loss_by_hand_and_by_the_measure() -> None:
    first, second = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 2, 4]])
    assert_close(IoULoss()(first, second).item(), 0.6931472)  # IoU 1/2
    first, _ = _pairs()
    second = first + torch.rand(20, 4) * 4  # all overlap: sides are at least 5
    assert_close(IoULoss()(first, second), -box_iou(first, second).diagonal().log().sum())


@pytest.mark.parametrize("loss", [IoULoss(), GIoULoss(), DIoULoss(), CIoULoss()])
def test_equal_boxes_cost_nothing_and_apart_ones_stay_finite(loss: nn.Module) -> None:
    box = torch.tensor([[3.0, 4, 13, 24]])
    assert_close(loss(box, box).item(), 0.0, rtol=0, atol=1e-5)
    apart = torch.tensor([[30.0, 40, 35, 44]], requires_grad=True)
    value = loss(apart, box)
    value.backward()
    assert float(value.detach()) > 0.9 and apart.grad is not None and bool(apart.grad.isfinite().all())
    none = torch.zeros(0, 4, requires_grad=True)
    assert loss(none, torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("loss", [IoULoss(), GIoULoss(), DIoULoss(), CIoULoss()])
def test_boxes_without_sides_have_finite_losses_and_gradients(loss: nn.Module) -> None:
    points = torch.tensor([[5.0, 5, 5, 5], [5, 5, 9, 5], [0, 0, 0, 0], [700, 700, 700, 700]], requires_grad=True)
    value = loss(points, torch.tensor([[3.0, 4, 13, 24]]).expand(4, 4))
    value.backward()
    assert 4.0 <= float(value.detach()) < 1e3  # 1 - IoU is 1 for each of them
    assert points.grad is not None and bool(points.grad.isfinite().all())
