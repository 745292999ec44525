from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from detseg.nn import CheckpointMismatch, MobileNetV3
from detseg.nn.mobile import conv_norm, draw_normal


def test_maps_are_c4s_expansion_and_c5() -> None:
    for reduced, last in ((True, 480), (False, 960)):
        body = MobileNetV3(reduced_tail=reduced).eval()
        assert body.channels == [672, last] and body.strides == [16, 32]
        with torch.no_grad():
            fine, coarse = body(torch.rand(1, 3, 64, 97))
        assert tuple(fine.shape) == (1, 672, 4, 7) and tuple(coarse.shape) == (1, last, 2, 4)
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    assert MobileNetV3(frozen_norm=True).state_dict().keys() == {
        key for key in MobileNetV3().state_dict() if "num_batches" not in key
    }


def test_published_weights_of_the_classifier_load_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = torchvision.models.mobilenet_v3_large(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    body = MobileNetV3(weights=tmp_path / "net.pth", reduced_tail=False).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(body(images)[1], network.features(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointMismatch, match="features"):
        MobileNetV3(weights=tmp_path / "net.pth", reduced_tail=True)


def test_depthwise_convolutions_see_one_channel_each() -> None:
    block = conv_norm(4, 4, size=3, stride=2, depthwise=True).eval()
    image = torch.zeros(1, 4, 8, 8)
    image[0, 2] = 1.0
    found = block(image)
    assert tuple(found.shape) == (1, 4, 4, 4)
    assert not bool(found[0, [0, 1, 3]].any()) and float(found.detach().amax()) <= 6.0


def test_first_weights_are_narrow() -> None:
    layer = nn.Conv2d(64, 64, 3)
    draw_normal(layer)
    assert_close(float(layer.weight.detach().std()), 0.03, rtol=0.02, atol=0)
    assert not bool(layer.bias.any())
