from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn.deformable import DeformableConvolution, convolution_block


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


@pytest.mark.parametrize("deformable", [False, True])
def test_a_block_keeps_the_size_and_has_the_weights_of_one_convolution(deformable: bool) -> None:
    block = convolution_block(6, 5, deformable=deformable)
    maps = block(torch.rand(2, 6, 7, 3))
    assert maps.shape == (2, 5, 7, 3) and float(maps.detach().min()) == 0.0
    places = 9 * 6 * 27 + 27 if deformable else 0
    assert sum(value.numel() for value in block.parameters()) == 9 * 6 * 5 + 2 * 5 + places


@torch.no_grad()
def test_bfloat16_gives_what_float32_does_but_for_rounding() -> None:
    torch.manual_seed(0)
    layer = DeformableConvolution(8, 4)
    nn.init.normal_(layer.places.weight, std=0.1)
    maps = torch.randn(1, 8, 6, 7)
    wanted = layer(maps)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(maps)
    whole = layer.bfloat16()(maps.bfloat16())
    assert mixed.dtype == whole.dtype == torch.bfloat16
    for found in (mixed, whole):
        assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
