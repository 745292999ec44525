from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.models.dilated import ContextModule, DilatedNet, start_as_identity
from detseg.nn import TinyBackbone, VGGEncoder


def test_table_1():
    module = ContextModule(num_classes=3)
    convolutions = [layer for layer in module if isinstance(layer, nn.Conv2d)]
    assert [layer.dilation[0] for layer in convolutions] == [1, 1, 2, 4, 8, 16, 1, 1]
    assert {layer.out_channels for layer in convolutions} == {3}
    for layer in convolutions:
        nn.init.constant_(layer.weight, 1.0)
    maps = torch.zeros(1, 3, 81, 81)
    maps[:, :, 40, 40] = 1
    rows = (module(maps)[0, 0] != 0).any(dim=1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 67  # the receptive field in the table's last column
    large = [layer.out_channels for layer in ContextModule(num_classes=3, large=True) if isinstance(layer, nn.Conv2d)]
    assert large == [6, 6, 12, 24, 48, 96, 96, 3]


def test_the_basic_module_starts_as_the_identity():
    maps = torch.rand(2, 4, 9, 11)  # scores above 0, which ReLU leaves alone
    assert_close(ContextModule(num_classes=4)(maps), maps)
    quiet = ContextModule(num_classes=4, large=True, noise=0.0)
    assert_close(quiet(maps), maps)


def test_groups_pass_their_own_class_on():
    layer = nn.Conv2d(4, 2, 3)
    start_as_identity(layer, groups=2)
    assert layer.weight[:, :, 1, 1].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]


def test_the_front_end_is_an_eighth_and_dilated():
    with torch.device("meta"):
        body = VGGEncoder(fully_connected=4096, output_stride=8, strides=(8,))
        model = DilatedNet(num_classes=21, backbone=body)
    dilations = [layer.dilation[0] for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d)]
    assert dilations == [1] * 10 + [2] * 3 + [4, 1]  # section 4
    assert model.backbone.channels == [4096]


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (5, 1), (1, 70)])
@pytest.mark.parametrize("dilations", [(), (1, 2)])
def test_logits_have_the_size_of_the_input(size, dilations):
    body = TinyBackbone(widths=(8, 8), stem=8, strides=(8,))
    model = DilatedNet(num_classes=3, backbone=body, dilations=dilations)
    assert model(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_errors():
    with pytest.raises(ValueError, match="the large form has 7 dilations, not 2"):
        ContextModule(num_classes=3, dilations=(1, 2), large=True)
