from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.nn import BackboneWithPAN, TinyBackbone


def _neck(channels: int | list[int] = 16, widths: tuple[int, ...] = (8, 16, 24)) -> BackboneWithPAN:
    body = TinyBackbone(widths=widths)
    return BackboneWithPAN(backbone=body, channels=channels, width=1.0).eval()


@pytest.mark.parametrize("channels", [16, [8, 16, 32]])
def test_levels_have_the_channels_asked_for_at_the_bodys_strides(channels: int | list[int]) -> None:
    neck = _neck(channels)
    levels = neck(torch.rand(2, 3, 50, 70))  # no multiple of a stride
    assert neck.strides == [4, 8, 16] and neck.channels == ([16] * 3 if channels == 16 else channels)
    assert [tuple(level.shape) for level in levels] == [
        (2, own, -(-50 // stride), -(-70 // stride)) for own, stride in zip(neck.channels, neck.strides, strict=True)
    ]


@torch.no_grad()
def test_maps_are_read_down_and_up_again() -> None:
    neck, images = _neck([8, 16, 24]), torch.rand(1, 3, 64, 32)
    fine, middle, coarse = neck.body(images)
    down = neck.down[1](torch.cat((F.interpolate(coarse, scale_factor=2), middle), 1))
    first = neck.down[0](torch.cat((F.interpolate(down, scale_factor=2), fine), 1))
    second = neck.up[0](torch.cat((neck.reduce[0](first), down), 1))
    third = neck.up[1](torch.cat((neck.reduce[1](second), coarse), 1))
    for level, wanted in zip(neck(images), (first, second, third), strict=True):
        assert_close(level, wanted)


def test_the_width_and_the_depth_scale_it() -> None:
    body = TinyBackbone(widths=(8, 16, 24))
    neck = BackboneWithPAN(
        backbone=body, channels=[64, 128, 2048], width=0.25, depth=1.0, max_channels=256, nested_from=8
    )
    assert neck.channels == [16, 32, 64]
    assert [len(block.blocks) for block in neck.down] == [2, 2]
    kinds = [type(block.blocks[0]).__name__ for block in (*neck.down, *neck.up)]
    assert kinds == ["Bottleneck", "NestedBlock", "NestedBlock", "NestedBlock"]


def test_one_map_is_given_its_width() -> None:
    body = TinyBackbone(widths=(8, 16), strides=(8,))
    neck = BackboneWithPAN(backbone=body, channels=24, width=1.0)
    assert [tuple(level.shape) for level in neck(torch.rand(1, 3, 32, 32))] == [(1, 24, 4, 4)]


@pytest.mark.parametrize("extra, strides", [("pool", [32]), ("p6p7", [32, 64]), ("p6p7_from_p5", [32, 64])])
@torch.no_grad()
def test_coarser_levels_come_from_the_last_level_or_map(extra: str, strides: list[int]) -> None:
    neck = BackboneWithPAN(backbone=TinyBackbone(widths=(8, 16, 24)), channels=16, width=1.0, extra=extra).eval()
    images = torch.rand(1, 3, 128, 64)
    maps, levels = neck.body(images), neck(images)
    assert neck.strides == [4, 8, 16, *strides] and neck.channels == [16] * len(levels)
    assert [level.shape[2] for level in levels] == [128 // stride for stride in neck.strides]
    if extra == "pool":
        assert_close(levels[3], levels[2][:, :, ::2, ::2])
    else:
        assert_close(levels[3], neck.extra.p6(levels[2] if extra == "p6p7_from_p5" else maps[2]))
        assert_close(levels[4], neck.extra.p7(levels[3].relu()))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels are \[8, 16\] and the backbone's strides \[4, 8, 16\]"):
        _neck([8, 16])
    with pytest.raises(ValueError, match=r"strides \[4, 16\]"):
        BackboneWithPAN(backbone=TinyBackbone(widths=(8, 16, 24), strides=(4, 16)), channels=8)
    with pytest.raises(ValueError, match="extra must be pool"):
        BackboneWithPAN(backbone=TinyBackbone(widths=(8, 16, 24)), extra="p6")
