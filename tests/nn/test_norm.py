from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from detseg.nn import freeze_batch_norm, set_norm_eps


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), nn.Sequential(nn.BatchNorm2d(4)))
    for norm in (body[1], body[2][0]):
        nn.init.uniform_(norm.weight)
        norm.running_mean.uniform_()
        norm.running_var.uniform_(0.5, 1.0)
    return body


def test_frozen_equals_evaluation_and_stays():
    body, images = network().eval(), torch.rand(2, 3, 5, 5)
    expected = body(images)
    frozen = freeze_batch_norm(body)
    assert frozen is body
    assert isinstance(body[1], FrozenBatchNorm2d)
    assert body[1].eps == 1e-3
    assert_close(body.train()(images), expected)
    assert [name for name, _ in body.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_equals_torchvisions_in_values_and_gradients(dtype):
    ours = freeze_batch_norm(network())[1]
    theirs = FrozenBatchNorm2d(4, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 4, 5, 6, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    gradients = []
    for norm in (ours, theirs):
        x = images.clone().requires_grad_()
        norm(x).square().sum().backward()
        gradients.append(x.grad)
    assert_close(ours(images).float(), theirs(images).float(), **tolerance)
    assert_close(*gradients, **tolerance)


def test_only_untrained():
    body = network()
    body[1].requires_grad_(False)
    freeze_batch_norm(body, untrained_only=True)
    assert isinstance(body[1], FrozenBatchNorm2d)
    assert isinstance(body[2][0], nn.BatchNorm2d)


def test_timm_norms_keep_their_activation():
    timm_norm = pytest.importorskip("timm.layers").BatchNormAct2d(4)
    body, images = nn.Sequential(timm_norm).eval(), torch.randn(2, 4, 3, 3)
    expected = body(images)
    keys = {key for key in body.state_dict() if "num_batches" not in key}
    freeze_batch_norm(body)
    assert_close(body.train()(images), expected)
    assert body(images).min() == 0
    assert body.state_dict().keys() == keys


def test_eps_of_all_norms_and_a_bare_norm():
    body = freeze_batch_norm(network())
    set_norm_eps(body, 0.0)
    assert {body[1].eps, body[2][0].eps} == {0.0}
    with pytest.raises(TypeError, match="give the network that holds"):
        freeze_batch_norm(nn.BatchNorm2d(3))
