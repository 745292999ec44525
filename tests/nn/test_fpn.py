from __future__ import annotations

import pytest
import torch
import torchvision
from torch.testing import assert_close

from detseg.nn import BackboneWithFPN, TinyBackbone, TorchvisionBackbone


@pytest.mark.parametrize(
    ("extra", "strides"),
    [(None, [4, 8, 16, 32]), ("pool", [4, 8, 16, 32, 64]), ("p6p7", [4, 8, 16, 32, 64, 128])],
)
def test_levels_have_one_width_and_double_strides(extra, strides):
    pyramid = BackboneWithFPN(backbone=TinyBackbone(widths=(8, 8, 8, 16)), channels=24, extra=extra)
    levels = pyramid(torch.rand(1, 3, 256, 128))
    assert pyramid.strides == strides
    assert pyramid.channels == [24] * len(strides)
    assert [tuple(level.shape) for level in levels] == [(1, 24, 256 // stride, 128 // stride) for stride in strides]


def test_equals_torchvision_with_its_keys():
    theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.eval()
    body = TorchvisionBackbone(name="resnet50", strides=(8, 16, 32), frozen_norm=True)
    ours = BackboneWithFPN(backbone=body, extra="p6p7_from_p5").eval()
    assert ours.state_dict().keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = list(theirs(images).values())
        for level, reference in zip(ours(images), expected, strict=True):
            assert_close(level, reference, rtol=1e-4, atol=1e-5)
    assert ours.strides == [8, 16, 32, 64, 128]


def test_p6_is_of_the_backbone_or_the_pyramid_even_where_widths_are_equal():
    body = TinyBackbone(widths=(8, 16))
    for extra, expected in (("p6p7", False), ("p6p7_from_p5", True)):
        assert BackboneWithFPN(backbone=body, channels=16, extra=extra).fpn.extra_blocks.use_P5 is expected


def test_norm_follows_every_convolution_of_the_pyramid():
    for norm, kind in (("batch", torch.nn.BatchNorm2d), ("group", torch.nn.GroupNorm)):
        pyramid = BackboneWithFPN(backbone=TinyBackbone(widths=(8, 16)), channels=16, norm=norm)
        assert sum(isinstance(module, kind) for module in pyramid.fpn.modules()) == 4
    with pytest.raises(ValueError, match="norm must be batch, group or null, not 'layer'"):
        BackboneWithFPN(backbone=TinyBackbone(widths=(8, 16)), norm="layer")
    with pytest.raises(ValueError, match="extra must be pool"):
        BackboneWithFPN(backbone=TinyBackbone(widths=(8, 16)), extra="p6")
