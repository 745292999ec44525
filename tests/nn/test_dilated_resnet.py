from __future__ import annotations

import pytest
import torch
import torchvision
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from detseg.nn import DilatedResNet


@pytest.mark.parametrize(("stride", "strides"), [(8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32])])
def test_maps_have_the_strides(stride, strides):
    body = DilatedResNet(output_stride=stride, stages=(1, 2, 3, 4)).eval()
    assert body.strides == strides
    with torch.no_grad():
        found = body(torch.rand(1, 3, 64, 64))
    assert [64 // level.shape[2] for level in found] == strides
    assert [level.shape[1] for level in found] == body.channels == [256, 512, 1024, 2048]


def test_weights_of_a_plain_network_load(tmp_path):
    theirs = torchvision.models.resnet50(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = DilatedResNet(weights=tmp_path / "resnet50.pth", output_stride=32, stages=(4,), frozen_norm=True).eval()
    assert any(isinstance(module, FrozenBatchNorm2d) for module in ours.modules())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(maps))))
        assert_close(ours(images)[0], expected, rtol=1e-4, atol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="output_stride 4 must be one of"):
        DilatedResNet(output_stride=4)
    with pytest.raises(ValueError, match=r"stages \[5\]"):
        DilatedResNet(stages=(5,))
    with pytest.raises(ValueError, match="torchvision cannot dilate resnet18"):
        DilatedResNet(name="resnet18")
