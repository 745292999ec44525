from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.nn.csp import (
    AttentionBlock,
    CSPBackbone,
    CSPBlock,
    FastPyramidPooling,
    NestedBlock,
    PartialAttention,
    convolution,
    scaled_depth,
    scaled_width,
)

SIZES = {
    "n": (0.5, 0.25, 1024),
    "s": (0.5, 0.5, 1024),
    "m": (0.5, 1.0, 512),
    "l": (1.0, 1.0, 512),
    "x": (1.0, 1.5, 512),
}


@pytest.mark.parametrize(
    ("size", "channels", "rows"), [("n", [128, 128, 256], 1), ("m", [512] * 3, 1), ("x", [768] * 3, 2)]
)
def test_the_sizes_have_their_channels_and_blocks(size: str, channels: list[int], rows: int) -> None:
    depth, width, most = SIZES[size]
    with torch.device("meta"):
        body = CSPBackbone(depth=depth, width=width, max_channels=most)
        levels = body(torch.zeros(1, 3, 100, 70))  # no multiple of a stride
    assert body.channels == channels and body.strides == [8, 16, 32]
    assert [tuple(level.shape) for level in levels] == [
        (1, own, -(-100 // stride), -(-70 // stride)) for own, stride in zip(channels, body.strides, strict=True)
    ]
    assert [len(stage[1].blocks) for stage in body.stages] == [rows] * 4
    assert [isinstance(stage[1].blocks[0], NestedBlock) for stage in body.stages] == [False, False, True, True]


def test_widths_are_multiples_of_eight_and_a_row_has_a_block() -> None:
    assert [scaled_width(value, width=0.25, max_channels=1024) for value in (64, 100, 2048)] == [16, 32, 256]
    assert [scaled_depth(2, depth=depth) for depth in (0.1, 0.5, 1.0)] == [1, 1, 2]


def test_fewer_stages_are_built_and_wrong_strides_refused() -> None:
    body = CSPBackbone(strides=(4, 8))
    assert body.channels == [64, 128] and len(body.stages) == 2 and isinstance(body.stages[-1][-1], PartialAttention)
    with pytest.raises(ValueError, match=r"strides \[2\] must be among them"):
        CSPBackbone(strides=(2,))
    with pytest.raises(ValueError, match=r"expansions \[1\]"):
        CSPBackbone(expansion=(1,))


@torch.no_grad()
def test_a_block_keeps_what_each_of_its_blocks_gives() -> None:
    block = CSPBlock(6, 10, hidden=4, depth=2, nested=False).eval()
    maps = torch.rand(2, 6, 5, 7)
    half, through = block.enter(maps)[:, :4], block.enter(maps)[:, 4:]
    first = through + block.blocks[0].body(through)
    second = first + block.blocks[1].body(first)
    assert_close(block(maps), block.leave(torch.cat((half, through, first, second), 1)))
    assert block(maps).shape == (2, 10, 5, 7)


@torch.no_grad()
def test_pooling_sees_five_nine_and_thirteen_cells() -> None:
    block = FastPyramidPooling(8).eval()
    block.enter = block.leave = nn.Identity()
    maps = torch.randn(1, 4, 20, 17)
    wanted = [maps, *(F.max_pool2d(maps, size, stride=1, padding=size // 2) for size in (5, 9, 13))]
    assert_close(block(maps), torch.cat(wanted, 1), rtol=0, atol=0)


@torch.no_grad()
def test_attention_is_the_softmax_of_products_cell_by_cell() -> None:
    block = AttentionBlock(128).eval()
    assert block.heads == 2
    maps = torch.randn(1, 128, 3, 2)
    joint = block.project_in(maps).view(2, 128, 6)  # heads, 32 + 32 + 64, cells
    seen = []
    for head in joint:
        query, key, value = head[:32], head[32:64], head[64:]
        columns = [((query[:, i] @ key) / 32**0.5).softmax(0) @ value.T for i in range(6)]
        seen.append(torch.stack(columns, 1))
    values = joint[:, 64:].reshape(1, 128, 3, 2)
    attended = maps + block.project_out(torch.cat(seen).view(1, 128, 3, 2) + block.position(values))
    assert_close(block(maps), attended + block.feed(attended), rtol=1e-4, atol=1e-5)
    assert AttentionBlock(200).heads == 2 and AttentionBlock(24).heads == 1  # 200 channels have no three equal parts


@torch.no_grad()
def test_half_of_the_channels_go_around_attention() -> None:
    block = PartialAttention(16, depth=2).eval()
    maps = torch.randn(1, 16, 4, 4)
    around, through = block.enter(maps).chunk(2, 1)
    for part in block.blocks:
        through = part(through)
    assert len(block.blocks) == 2
    assert_close(block(maps), block.leave(torch.cat((around, through), 1)))


def test_a_convolution_has_a_norm_and_an_activation_where_wanted() -> None:
    assert [type(layer).__name__ for layer in convolution(4, 6, 3)] == ["Conv2d", "BatchNorm2d", "SiLU"]
    assert [type(layer).__name__ for layer in convolution(4, 6, active=False)] == ["Conv2d", "BatchNorm2d"]
    assert convolution(4, 4, 3, groups=4, stride=2)(torch.rand(1, 4, 5, 8)).shape == (1, 4, 3, 4)
