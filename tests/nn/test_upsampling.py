from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detseg.nn import (
    BedOfNails,
    BilinearUpsampling,
    MaxUnpooling,
    NearestUpsampling,
    ResizeConvolution,
    TransposedConvolution,
)
from detseg.ops.upsampling import checkerboard_energy, pool_with_switches

KINDS = (BedOfNails, BilinearUpsampling, MaxUnpooling, NearestUpsampling, ResizeConvolution, TransposedConvolution)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 4])
def test_one_interface(kind, factor):
    layer = kind(channels=6, width=4, factor=factor)
    maps = torch.randn(2, 6, 3, 5)
    _, switches = pool_with_switches(torch.randn(2, 4, 3 * factor, 5 * factor), factor)
    given = switches if layer.needs_switches else None
    result = layer(maps, given)
    assert result.shape == (2, 4, 3 * factor, 5 * factor)
    result.square().sum().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in layer.parameters())
    assert layer.needs_switches == (kind is MaxUnpooling)


def test_without_a_change_of_channels_the_fixed_ways_have_no_weights():
    for kind in KINDS[:4]:
        assert list(kind(channels=3, width=3).parameters()) == []


def test_values_by_hand():
    maps = torch.tensor([[1.0, 3.0]])[None, None]
    assert NearestUpsampling(channels=1, width=1)(maps)[0, 0].tolist() == [[1, 1, 3, 3]] * 2
    assert BilinearUpsampling(channels=1, width=1)(maps)[0, 0].tolist() == [[1, 1.5, 2.5, 3]] * 2
    assert BedOfNails(channels=1, width=1)(maps)[0, 0].tolist() == [[1, 0, 3, 0], [0, 0, 0, 0]]
    paint = TransposedConvolution(channels=1, width=1, bias=False)
    with torch.no_grad():
        paint.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
    assert paint(maps)[0, 0].tolist() == [[1, 2, 3, 6], [3, 4, 9, 12]]


@pytest.mark.parametrize("factor", [2, 3, 8])
@pytest.mark.parametrize("depthwise", [False, True])
def test_bilinear_weights_interpolate(factor, depthwise):
    layer = TransposedConvolution(channels=2, width=2, factor=factor, bilinear=True, depthwise=depthwise, bias=False)
    maps = torch.randn(1, 2, 4, 5)
    wanted = F.interpolate(maps, scale_factor=float(factor), mode="bilinear", align_corners=False)
    inner = (..., slice(factor, -factor), slice(factor, -factor))  # torch repeats the edge, the kernel sees zeros
    assert_close(layer(maps)[inner], wanted[inner])


@pytest.mark.parametrize(("factor", "kernel"), [(2, 2), (2, 3), (2, 4), (2, 5), (3, 4), (4, 7)])
def test_any_kernel_gives_exactly_the_factor(factor, kernel):
    layer = TransposedConvolution(channels=1, width=2, factor=factor, kernel=kernel)
    assert layer(torch.randn(1, 1, 1, 3)).shape == (1, 2, factor, 3 * factor)


def test_fixed_weights_do_not_learn():
    layer = TransposedConvolution(channels=2, width=2, bilinear=True, learn=False)
    assert not any(value.requires_grad for value in layer.parameters())


def test_the_measure_tells_transposed_from_resize_convolution():
    maps = torch.rand(1, 8, 32, 32)
    transposed = [TransposedConvolution(channels=8, width=8, kernel=kernel) for kernel in (2, 3, 4)]
    resized = [ResizeConvolution(channels=8, width=8, mode=mode) for mode in ("nearest", "bilinear")]

    def energy(layer: nn.Module) -> float:
        with torch.no_grad():
            return float(checkerboard_energy(layer(maps)[..., 4:-4, 4:-4], 2).mean())

    assert min(map(energy, transposed)) > 100 * max(map(energy, resized))
    assert max(map(energy, resized)) < 1e-3


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="kernel 2 leaves gaps at factor 3"):
        TransposedConvolution(channels=1, width=1, factor=3, kernel=2)
    with pytest.raises(ValueError, match="4 channels become 2, but bilinear"):
        TransposedConvolution(channels=4, width=2, bilinear=True)
    with pytest.raises(ValueError, match="kernel 2 must be odd"):
        ResizeConvolution(channels=1, width=1, kernel=2)
    with pytest.raises(ValueError, match="max-unpooling needs switches"):
        MaxUnpooling(channels=1, width=1)(torch.zeros(1, 1, 2, 2))
