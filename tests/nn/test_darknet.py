from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn import Darknet19, Darknet53, YOLOv1Body
from detseg.nn.backbone import Backbone

SMALL = [
    (Darknet19(widths=(4, 8, 8), depths=(1, 1, 3), strides=(2, 4)), [8, 8], [2, 4]),
    (Darknet53(widths=(4, 8, 8, 12), blocks=(1, 2, 1), strides=(4, 8)), [8, 12], [4, 8]),
    (YOLOv1Body(width=1 / 64, norm=True), [16], [64]),
]


def parameters(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.Conv2d) for layer in network.modules())


def test_darknet19_is_table_6_without_its_classifier() -> None:
    """With the 2 * 7,200 running statistics that is 19,831,776 numbers, the length of the released weights file."""
    table = [(3, 32, 3), (32, 64, 3)]
    table += [(64, 128, 3), (128, 64, 1), (64, 128, 3)]
    table += [(128, 256, 3), (256, 128, 1), (128, 256, 3)]
    table += [(256, 512, 3), (512, 256, 1), (256, 512, 3), (512, 256, 1), (256, 512, 3)]
    table += [(512, 1024, 3), (1024, 512, 1), (512, 1024, 3), (1024, 512, 1), (512, 1024, 3)]
    network = Darknet19()
    assert convolutions(network) == len(table) == 18  # the 19th gives ImageNet's 1000 logits
    assert parameters(network) == sum(i * o * k * k + 2 * o for i, o, k in table) == 19_817_376
    assert (network.channels, network.strides) == ([512, 1024], [16, 32])


def test_darknet53_is_table_1_and_as_long_as_timms() -> None:
    """With the 2 * 17,856 running statistics that is 40,620,640 numbers, the length of the released weights file."""
    network = Darknet53()
    assert convolutions(network) == 52  # the 53rd layer classifies
    kernels = 3 * 32 * 9 + sum(
        width // 2 * width * 9 + count * (width * width // 2 + width // 2 * width * 9)
        for width, count in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))
    )
    norms = 2 * (
        32
        + sum(
            width + count * (width // 2 + width) for width, count in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))
        )
    )
    assert parameters(network) == kernels + norms == 40_584_928
    theirs = timm.create_model("darknet53", pretrained=False, num_classes=0)
    assert parameters(theirs) == parameters(network)


@torch.no_grad()
def test_darknet53_equals_timms_on_its_weights() -> None:
    theirs = timm.create_model("darknet53", pretrained=False, features_only=True, out_indices=(3, 4, 5)).eval()
    ours = Darknet53().eval()
    own, other = list(ours.state_dict()), list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(own, other, strict=True)))  # both list their layers in the order of the paper
    for layer in theirs.modules():
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = 0.1  # timm's default is torch's 0.01
    images = torch.rand(1, 3, 64, 64)
    for found, wanted in zip(ours(images), theirs(images), strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_yolo_v1_has_24_convolutions_of_figure_3() -> None:
    table = [(3, 64, 7), (64, 192, 3), (192, 128, 1), (128, 256, 3), (256, 256, 1), (256, 512, 3)]
    table += [(512, 256, 1), (256, 512, 3)] * 4 + [(512, 512, 1), (512, 1024, 3)]
    table += [(1024, 512, 1), (512, 1024, 3)] * 2 + [(1024, 1024, 3)] * 4
    with torch.device("meta"):
        network = YOLOv1Body()
    assert convolutions(network) == len(table) == 24
    assert parameters(network) == sum(i * o * k * k + o for i, o, k in table) == 60_155_968  # biases, no norm
    assert (network.channels, network.strides) == ([1024], [64])


@pytest.mark.parametrize(("network", "channels", "strides"), SMALL)
@pytest.mark.parametrize("size", [(64, 64), (37, 90), (1, 5)])
def test_maps_are_as_promised_for_any_size(
    network: Backbone, channels: list[int], strides: list[int], size: tuple[int, int]
) -> None:
    maps = network.eval()(torch.rand(2, 3, *size))
    assert (network.channels, network.strides) == (channels, strides)
    expected = [(2, c, math.ceil(size[0] / s), math.ceil(size[1] / s)) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(level.shape) for level in maps] == expected


def test_stages_beyond_the_last_wanted_stride_are_not_built() -> None:
    assert convolutions(Darknet19(strides=(4,))) == 5 and convolutions(Darknet53(strides=(1, 2))) == 4


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"Darknet19 has maps of strides \[1, 2\], not \[64\]"):
        Darknet19(widths=(4, 8), depths=(1, 1), strides=(2, 64))
    with pytest.raises(ValueError, match=r"depths \[1, 2\].*odd"):
        Darknet19(widths=(4, 8), depths=(1, 2), strides=(2,))
    with pytest.raises(ValueError, match=r"blocks \[1\]"):
        Darknet53(widths=(4, 8, 8), blocks=(1,), strides=(2,))
    with pytest.raises(ValueError, match=r"not \[\]"):
        Darknet53(strides=())
