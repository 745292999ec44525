from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn import BackboneWithConcat, BackboneWithPassthrough, Darknet19, Darknet53


def numbers(network: nn.Module) -> int:
    """Count what a released weights file holds: parameters and the two running statistics."""
    tracked = [key for key in network.state_dict() if key.endswith("num_batches_tracked")]
    return sum(value.numel() for value in network.state_dict().values()) - len(tracked)


def tiny19(strides: tuple[int, ...] = (4, 8)) -> Darknet19:
    return Darknet19(widths=(4, 4, 6, 8), depths=(1, 1, 1, 1), strides=strides)


@pytest.mark.parametrize("reduce", [None, 3])
def test_passthrough_stacks_the_four_fine_cells_of_a_coarse_one(reduce: int | None) -> None:
    neck = BackboneWithPassthrough(backbone=tiny19(), width=10, reduce=reduce).eval()
    seen: list[torch.Tensor] = []
    neck.join.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.rand(2, 3, 32, 48)
    (found,) = neck(images)
    assert found.shape == (2, 10, 4, 6) and (neck.channels, neck.strides) == ([10], [8])
    fine = neck.reduce(neck.body(images)[0])
    channels = fine.shape[1]
    assert seen[0].shape[1] == 4 * channels + 10
    for row, column in ((0, 0), (3, 5), (2, 1)):
        for channel in range(channels):
            square = fine[:, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)  # (2, 4)
            assert_close(seen[0][:, 4 * channel : 4 * channel + 4, row, column], square)


@pytest.mark.parametrize("size", [(37, 90), (8, 8), (1, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    shape = [-(-size[0] // 8), -(-size[1] // 8)]
    (found,) = BackboneWithPassthrough(backbone=tiny19(), width=10).eval()(torch.rand(1, 3, *size))
    assert list(found.shape[2:]) == shape
    body = Darknet53(widths=(4, 4, 6, 8), blocks=(1, 1, 1), strides=(2, 4, 8))
    levels = BackboneWithConcat(backbone=body).eval()(torch.rand(1, 3, *size))
    assert [list(level.shape[2:]) for level in levels] == [[-(-size[0] // s), -(-size[1] // s)] for s in (2, 4, 8)]


def test_levels_join_the_map_and_the_coarser_level() -> None:
    body = Darknet53(widths=(4, 4, 6, 8), blocks=(1, 1, 1), strides=(4, 8))
    neck = BackboneWithConcat(backbone=body, widths=[5, 7], depth=3).eval()
    images = torch.rand(1, 3, 16, 16)
    fine, coarse = body(images)
    wanted_coarse = neck.levels[1](coarse)
    grown = neck.laterals[0](wanted_coarse).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    wanted_fine = neck.levels[0](torch.cat([grown, fine], dim=1))
    for found, wanted in zip(neck(images), [wanted_fine, wanted_coarse], strict=True):
        assert_close(found, wanted)
    assert (neck.channels, neck.strides) == ([5, 7], [4, 8])
    kernels = [layer[0].kernel_size[0] for layer in neck.levels[0]]
    assert kernels == [1, 3, 1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"strides \[2, 8\]; it must give two"):
        BackboneWithPassthrough(backbone=tiny19((2, 8)))
    with pytest.raises(ValueError, match=r"depth is 4"):
        BackboneWithConcat(backbone=tiny19(), depth=4)
    with pytest.raises(ValueError, match=r"widths \[3\].*strides \[4, 8\]"):
        BackboneWithConcat(backbone=tiny19(), widths=[3])
