from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn.hourglass import Hourglass, StackedHourglass
from detseg.nn.tiny import ResidualBlock


def _block(before: int, after: int, *, changes: bool) -> int:
    """Weights of a residual block: two 3x3 convolutions, a 1x1 one where the shape changes, a norm after each."""
    return 9 * before * after + 9 * after * after + 4 * after + (before * after + 2 * after if changes else 0)


def _glass(widths: list[int], depths: list[int]) -> int:
    """Weights of one hourglass, counted from the paper's words."""
    (width, below), depth = widths[:2], depths[0]
    count = depth * _block(width, width, changes=False)
    count += _block(width, below, changes=True) + (depth - 1) * _block(below, below, changes=False)
    count += (depth - 1) * _block(below, below, changes=False) + _block(below, width, changes=below != width)
    if len(widths) == 2:
        return count + depths[1] * _block(below, below, changes=False)
    return count + _glass(widths[1:], depths[1:])


def test_hourglass_104_has_its_number_of_weights() -> None:
    with torch.device("meta"):
        model = StackedHourglass()
    stem = 3 * 128 * 49 + 2 * 128 + _block(128, 256, changes=True)
    glass = _glass([256, 256, 384, 384, 384, 512], [2, 2, 2, 2, 2, 4]) + 9 * 256 * 256 + 2 * 256
    between = 2 * (256 * 256 + 2 * 256) + _block(256, 256, changes=False)
    found = sum(value.numel() for value in model.parameters())
    assert found == stem + 2 * glass + between
    assert found == pytest.approx(187.7e6, rel=1e-3)
    assert (model.channels, model.strides) == ([256, 256], [4, 4])


def test_hourglass_104_is_104_layers_deep() -> None:
    """Its convolutions on the way through all halvings and doublings, the skips and projections aside.

    Up to the last map there are 103. The authors do not write how they count; the one that predicts makes it 104.
    """

    def depth(module: nn.Module) -> int:
        if isinstance(module, Hourglass):
            return depth(module.down) + depth(module.inner) + depth(module.up)
        if isinstance(module, ResidualBlock):
            return 2
        return int(isinstance(module, nn.Conv2d)) + sum(depth(child) for child in module.children())

    with torch.device("meta"):
        model = StackedHourglass()
    path = [model.stem, *model.hourglasses, *model.outputs, *model.joints]
    assert sum(depth(part) for part in path) + 1 == 104


def _small(**changes: object) -> StackedHourglass:
    settings = {"widths": (8, 12, 16), "depths": (1, 1, 2), "stacks": 2, "stem": 8, "out_channels": 10} | changes
    return StackedHourglass(**settings)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (7, 13), (1, 1)])
def test_every_stack_gives_a_map_of_stride_four_for_any_size(size: tuple[int, int]) -> None:
    maps = _small().eval()(torch.rand(2, 3, *size))
    assert [tuple(level.shape) for level in maps] == [(2, 10, -(-size[0] // 4), -(-size[1] // 4))] * 2


def test_a_small_map_is_doubled_cell_by_cell_and_cut() -> None:
    glass = Hourglass(widths=(1, 1), depths=(1, 1)).eval()
    for name in ("skip", "inner", "up"):
        setattr(glass, name, nn.Identity())
    glass.down = nn.AvgPool2d(1, stride=2)
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    wanted = maps + maps[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :3, :5]
    assert_close(glass(maps), wanted)


def test_the_second_hourglass_learns_from_the_first() -> None:
    model = _small()
    model(torch.rand(2, 3, 32, 32))[1].sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depths \[1, 2\]"):
        _small(depths=(1, 2))
    with pytest.raises(ValueError, match=r"stacks 0"):
        _small(stacks=0)
