from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.nn import DenseBlock, DoubleConvolution, InceptionBlock, ResidualDoubleConvolution

KINDS = (DoubleConvolution, ResidualDoubleConvolution, DenseBlock, InceptionBlock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "width"), [(6, 6), (3, 5)])
def test_each_reaches_two_cells_and_costs_four(kind, channels, width):
    valid, padded = (kind(channels, width, padding=padding, norm=False) for padding in (False, True))
    padded.load_state_dict(valid.state_dict())
    maps = torch.rand(2, channels, 9, 11, requires_grad=True)
    inner = valid(maps)
    assert inner.shape == (2, width, 5, 7)
    assert_close(padded(maps)[:, :, 2:-2, 2:-2], inner)
    (slope,) = torch.autograd.grad(inner[:, :, 2, 3].sum(), maps)
    seen = slope.abs().sum(dim=(0, 1)).nonzero()
    assert seen.min(dim=0).values.tolist() >= [2, 3]
    assert seen.max(dim=0).values.tolist() <= [6, 7]


def test_a_residual_block_without_weights_is_its_shortcut():
    block = ResidualDoubleConvolution(4, 4, padding=True, norm=False)
    for value in block.body.parameters():
        torch.nn.init.zeros_(value)
    maps = torch.rand(1, 4, 5, 5)
    assert_close(block(maps), maps)


def test_a_dense_blocks_last_layer_sees_everything():
    block = DenseBlock(3, 8, padding=False, norm=True)
    assert block.second[0].in_channels == 3 + 4
    assert block.join[0].in_channels == 3 + 4 + 4


def test_inception_widths_add_up():
    with pytest.raises(ValueError, match="3 is below 4"):
        InceptionBlock(4, 3, padding=True, norm=False)
    block = InceptionBlock(4, 10, padding=True, norm=False)
    assert [part.out_channels for part in (block.point[0], block.near[0], block.far[2])] == [2, 2, 6]
