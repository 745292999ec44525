from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close

from detseg.models.deeplabv3 import AtrousPyramid, DeepLabV3
from detseg.models.fcn import FCNHead
from detseg.nn import DilatedResNet, TinyBackbone
from segmenter_cases import maps


def small(**options) -> DeepLabV3:
    return DeepLabV3(num_classes=3, backbone=TinyBackbone(widths=(8, 16), stem=8), rates=(1, 2), width=8, **options)


def test_torchvisions_network_outputs_and_loss(tmp_path):
    torch.manual_seed(5)
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "deeplab.pth")
    ours = DeepLabV3(
        num_classes=4, backbone=DilatedResNet(), auxiliary=FCNHead, weights=tmp_path / "deeplab.pth"
    ).eval()
    images = torch.rand(2, 3, 65, 90)
    with torch.no_grad():
        outputs, expected = ours(images), theirs(ours.normalize(images))
        assert_close(outputs.logits, expected["out"])
        terms = ours.loss(outputs, truth := maps((65, 90), (65, 90), classes=4))
    labels = torch.stack([one.semantic.labels for one in truth])
    parts = {name: F.cross_entropy(value, labels, ignore_index=255) for name, value in expected.items()}
    assert_close(terms["loss_cross_entropy"], parts["out"])
    assert_close(terms["loss_auxiliary_cross_entropy"], 0.5 * parts["aux"])


def test_image_pooling_sees_the_whole_map():
    pyramid = AtrousPyramid(channels=2, width=3, rates=(2,), dropout=0.0).eval()
    maps_ = torch.randn(1, 2, 9, 9, requires_grad=True)
    result = pyramid(maps_)
    assert result.shape == (1, 3, 9, 9)
    (slope,) = torch.autograd.grad(result[0, :, 0, 0].sum(), maps_)
    assert (slope.abs().sum(dim=1) > 0).all()
    pyramid.convs[-1][1].weight.data.zero_()  # without it: the cell itself, and those of rate 2 beside it
    (slope,) = torch.autograd.grad(pyramid(maps_)[0, :, 0, 0].sum(), maps_)
    assert (slope[0].abs().sum(dim=0) > 0).nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (5, 1), (1, 70)])
def test_logits_have_the_size_of_the_input(size):
    assert small()(torch.rand(2, 3, *size)).shape == (2, 3, *size)
    assert small().eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_errors():
    with pytest.raises(ValueError, match="trains on batches of 2 images or more"):
        small()(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"needs a second map; the backbone has \[8\]"):
        DeepLabV3(num_classes=3, backbone=TinyBackbone(widths=(8, 8), strides=(8,)), auxiliary=FCNHead)
