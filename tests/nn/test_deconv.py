from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn.deconv import DeconvBackbone
from detseg.nn.deformable import DeformableConvolution
from detseg.nn.tiny import TinyBackbone


def _body() -> TinyBackbone:
    return TinyBackbone(widths=(8, 8, 16, 24), stem=8, strides=[32])


@pytest.mark.parametrize("options", [{}, {"convolution": True}, {"convolution": True, "deformable": True}])
@pytest.mark.parametrize("size", [(64, 96), (70, 33)])
def test_three_doublings_lead_from_stride_32_to_4(options: dict[str, bool], size: tuple[int, int]) -> None:
    model = DeconvBackbone(backbone=_body(), widths=(16, 12, 8), **options).eval()
    (level,) = model(torch.rand(2, 3, *size))
    assert tuple(level.shape) == (2, 8, -(-size[0] // 4), -(-size[1] // 4))
    assert (model.channels, model.strides) == ([8], [4])


def test_the_weights_of_both_papers() -> None:
    plain = DeconvBackbone(backbone=_body())  # Simple Baselines: three times 256 channels of 4 x 4
    assert sum(value.numel() for value in plain.up.parameters()) == 16 * 256 * (24 + 256 + 256) + 3 * 2 * 256
    wide = [24, 256, 128, 64]  # CenterNet: a 3x3 convolution before each, then the doubling of equal width
    count = sum(9 * before * after + 16 * after * after + 4 * after for before, after in pairwise(wide))
    model = DeconvBackbone(backbone=_body(), widths=(256, 128, 64), convolution=True)
    assert sum(value.numel() for value in model.up.parameters()) == count


def test_a_deformable_convolution_starts_as_half_a_plain_one_and_learns_where_to_look() -> None:
    layer = DeformableConvolution(3, 5)
    maps = torch.rand(2, 3, 6, 7)
    plain = nn.functional.conv2d(maps, layer.convolution.weight, padding=1)
    assert_close(layer(maps), plain / 2, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert layer.places.bias is not None
        layer.places.bias[1:18:2] = 1.0  # all nine places one cell to the right
    shifted = nn.functional.conv2d(maps[..., 1:], layer.convolution.weight, padding=1)
    assert_close(layer(maps)[..., 1:5], shifted[..., 1:5] / 2, rtol=1e-4, atol=1e-5)
    layer(maps).square().sum().backward()
    assert layer.places.weight.grad is not None and float(layer.places.weight.grad.abs().max()) > 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="6 transposed convolutions cannot bring a map of stride 32"):
        DeconvBackbone(backbone=_body(), widths=(8,) * 6)
    with pytest.raises(ValueError, match="set convolution too"):
        DeconvBackbone(backbone=_body(), deformable=True)
