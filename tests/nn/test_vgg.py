from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from detseg.nn import VGGEncoder
from detseg.nn.vgg import SubgridConvolution
from detseg.ops.upsampling import unpool


def small(**options) -> VGGEncoder:
    return VGGEncoder(widths=(4, 6, 8), convolutions=(1, 2, 1), **options)


def test_the_features_are_torchvisions(tmp_path):
    theirs = torchvision.models.vgg16(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "vgg16.pth")
    ours = VGGEncoder(fully_connected=4096, weights=tmp_path / "vgg16.pth").eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        found = ours(images)
        assert ours.strides == [2, 4, 8, 16, 32]
        assert [level.shape[2] for level in found] == [112, 56, 28, 14, 7]
        assert_close(found[3], theirs.features[:24](images))
        vector = theirs.classifier[:6](theirs.avgpool(theirs.features(images)).flatten(1))
    assert_close(found[4][:, :, 3, 3], vector, rtol=1e-4, atol=1e-5)  # fc6 sees all 7 x 7 cells from the middle one


def test_weights_without_a_classifier_leave_it_as_drawn(tmp_path):
    plain = VGGEncoder()
    torch.save(plain.state_dict(), tmp_path / "features.pth")
    other = VGGEncoder(fully_connected=8, kernel=3, weights=tmp_path / "features.pth")
    assert_close(other.features[28].weight, plain.features[28].weight)
    assert float(other.fc[0].weight.detach().std()) > 0


@pytest.mark.parametrize(
    ("stride", "dilations", "size"), [(8, [1, 1, 1, 1, 1], 4), (4, [1, 1, 1, 1, 2], 8), (2, [1, 1, 1, 2, 4], 16)]
)
def test_poolings_beyond_the_output_stride_give_way_to_dilation(stride, dilations, size):
    body = small(output_stride=stride, fully_connected=5, kernel=3)
    assert body.strides == [value for value in (2, 4, 8) if value <= stride]
    found = body(torch.rand(1, 3, 32, 32))
    assert [layer.dilation[0] for layer in body.modules() if isinstance(layer, nn.Conv2d)] == [*dilations, 1]
    assert found[-1].shape == (1, 5, size, size)
    assert body.channels[-1] == 5
    assert [level.shape[1] for level in found] == body.channels


@pytest.mark.parametrize(
    ("strides", "output_stride", "channels"),
    [
        ((2, 4), None, [4, 6]),
        ((4,), None, [6]),
        ((4, 8), None, [6, 5]),
        (None, None, [4, 6, 5]),
        ((2,), 4, [4]),
        ((2, 4), 4, [4, 5]),
    ],
)
def test_fully_connected_layers_are_those_of_the_last_map_alone(strides, output_stride, channels):
    body = small(strides=strides, output_stride=output_stride, fully_connected=5, kernel=3)
    assert body.channels == [level.shape[1] for level in body(torch.rand(1, 3, 32, 32))] == channels


def test_a_dilated_body_sees_what_the_strided_one_sees():
    strided, dilated = small().eval(), small(output_stride=4).eval()
    dilated.load_state_dict(strided.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        coarse, fine = strided(images)[-1], dilated(images)[-1]
        wanted = F.max_pool2d(fine, 1, stride=2)
    assert wanted.shape == coarse.shape
    # the left-out pooling took the largest of four, so the dilated map is no copy; its channels are the same
    assert dilated.channels[-1] == strided.channels[-1] == 8


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_subgrids_are_the_dilated_convolution(dilation, size):
    layer = SubgridConvolution(3, 4, 5, padding=2 * dilation, dilation=dilation)
    maps = torch.randn(2, 3, *size, requires_grad=True)
    ours = layer(maps)
    theirs = F.conv2d(maps, layer.weight, layer.bias, padding=2 * dilation, dilation=dilation)
    assert_close(ours, theirs)
    slopes = [torch.autograd.grad(value.square().sum(), [maps, layer.weight]) for value in (ours, theirs)]
    assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)


def test_switches_lead_back():
    body = small(norm=True).eval()
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        last, switches = body.with_switches(images)
        assert_close(last, body(images)[-1])
    assert [tuple(places.shape) for places in switches] == [(2, 4, 8, 12), (2, 6, 4, 6), (2, 8, 2, 3)]
    assert unpool(last, switches[-1], 2).shape == (2, 8, 4, 6)


def test_errors():
    with pytest.raises(ValueError, match="output_stride 16 must be one of"):
        small(output_stride=16)
    with pytest.raises(ValueError, match=r"up to 4, not \[8\]"):
        small(output_stride=4, strides=(8,))
    with pytest.raises(ValueError, match=r"up to 8, not \[\]"):
        small(strides=())
    with pytest.raises(ValueError, match="need one number per stage"):
        VGGEncoder(widths=(4,), convolutions=(1, 1))
