from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detseg.models import DeconvNet, SegNet
from detseg.nn import BilinearUpsampling, MirroredDecoder, TransposedConvolution
from segmenter_cases import maps

SIZES = {"widths": (4, 6, 8), "convolutions": (1, 2, 1)}


def segnet(**options) -> SegNet:
    return SegNet(num_classes=3, **SIZES, **options)


def test_the_papers_networks_have_the_papers_layers():
    with torch.device("meta"):
        decoder = MirroredDecoder(widths=(64, 128, 256, 512, 512), convolutions=(2, 2, 3, 3, 3), last=False)
        whole = MirroredDecoder(widths=(64, 128, 256, 512, 512), convolutions=(2, 2, 3, 3, 3), transposed=True)
    channels = [layer.out_channels for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]
    assert channels == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64]  # and the scores are the thirteenth
    mirror = [layer.out_channels for layer in whole.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert mirror == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 64]


def test_values_go_back_to_where_the_maxima_were():
    model = segnet().eval()
    images = torch.rand(1, 3, 16, 16)
    seen = []
    for layer in model.decoder.enlarge:
        layer.register_forward_hook(lambda module, given, result: seen.append((given[0], given[1], result)))
    with torch.no_grad():
        model(images)
    assert [tuple(result.shape[1:]) for _, _, result in seen] == [(8, 4, 4), (6, 8, 8), (4, 16, 16)]
    for before, switches, result in seen:
        assert_close(result, F.max_unpool2d(before, switches, 2))
        assert int((result != 0).sum()) <= before.numel()


def test_switches_carry_the_place_that_the_maps_have_lost():
    """A shift by one pixel inside a pooling's block changes no pooled value, yet moves the answer."""
    model = segnet().eval()
    with torch.no_grad():
        maps_, switches = model.backbone.with_switches(torch.rand(1, 3, 16, 16))
        plain = model.decoder(maps_, switches)
        moved = [places.clone() for places in switches]
        moved[0][..., 0, 0] = (moved[0][..., 0, 0] + 1) % 2  # the neighbour in the first row
        assert not torch.equal(plain, model.decoder(maps_, moved))


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (5, 1), (1, 70)])
def test_logits_have_the_size_of_the_input(size):
    for model in (segnet(), DeconvNet(num_classes=3, **SIZES, fully_connected=5, kernel=3)):
        logits = model(torch.rand(1, 3, *size))
        assert logits.shape == (1, 3, *size)
        torch.stack(list(model.loss(logits, maps(size)).values())).sum().backward()
        assert all(value.grad is not None for value in model.parameters())


@pytest.mark.parametrize("kind", [BilinearUpsampling, TransposedConvolution])
def test_another_way_up(kind):
    assert segnet(upsample=kind)(torch.rand(1, 3, 20, 20)).shape == (1, 3, 20, 20)


def test_deconvnet_undoes_its_fully_connected_layers():
    model = DeconvNet(num_classes=3, **SIZES, fully_connected=10, kernel=5, dropout=0.0)
    assert model.back[0].weight.shape == (10, 8, 5, 5)
    assert model.backbone.fc[0].weight.shape == (10, 8, 5, 5)
    assert float(model.back[0].weight.detach().std()) == pytest.approx((2 / (10 * 25)) ** 0.5, rel=0.1)
    with torch.device("meta"):
        paper = DeconvNet(num_classes=21)
    count = sum(value.numel() for value in paper.parameters())
    assert 251_000_000 < count < 253_000_000  # section 3.2's size: the two 7x7 layers have 103 million each
