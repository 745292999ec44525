"""Stacked hourglass: Newell, Yang and Deng, Stacked Hourglass Networks, 2016, arXiv:1603.06937.

Built in CornerNet's form (Law and Deng 2018, arXiv:1808.01244, section 3.5); the defaults are those of Hourglass-104:
strided convolutions in place of max pooling, five halvings, nearest up-sampling, two residual blocks per place and four
in the middle, and between two hourglasses 1x1 convolutions of input and output, added.

Differs: a map of odd size is rounded up when it is halved, and cut when it is doubled, so that any image size fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone
from detseg.nn.tiny import ResidualBlock


class Hourglass(nn.Module):
    """One hourglass: a path at full size beside one at half size, which holds the next smaller hourglass.

    Args:
        widths: channels at each size, the largest map first.
        depths: residual blocks at each size; the last number is that of the middle.
    """

    def __init__(self, *, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        width, below, depth = widths[0], widths[1], depths[0]
        self.skip = _blocks([width] * (depth + 1))
        self.down = _blocks([width] + [below] * depth, stride=2)
        inner = Hourglass(widths=widths[1:], depths=depths[1:]) if len(widths) > 2 else None
        self.inner = inner or _blocks([below] * (depths[1] + 1))
        self.up = _blocks([below] * depth + [width])

    def forward(self, maps: Tensor) -> Tensor:
        """Return a map of the same shape ``(B, widths[0], H, W)``."""
        small = self.up(self.inner(self.down(maps)))  # (B, C, ceil(H / 2), ceil(W / 2))
        large = F.interpolate(small, scale_factor=2.0, mode="nearest")  # (B, C, >= H, >= W)
        result: Tensor = self.skip(maps) + large[:, :, : maps.shape[2], : maps.shape[3]]
        return result


class StackedHourglass(Backbone):
    """A stem to stride 4, then hourglasses in a row; each gives a map of stride 4, so that all can be supervised.

    Args:
        widths: channels at each size inside an hourglass, from stride 4 on.
        depths: residual blocks at each size; the last number is that of the middle.
        stacks: how many hourglasses.
        stem: channels of the first convolution (7x7, stride 2).
        out_channels: of each map given.

    Raises:
        ValueError: widths and depths differ in length, or a number is not positive.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (256, 256, 384, 384, 384, 512),
        depths: Sequence[int] = (2, 2, 2, 2, 2, 4),
        stacks: int = 2,
        stem: int = 128,
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or len(widths) < 2 or min(*widths, *depths, stacks, stem, out_channels) < 1:
            raise ValueError(
                f"StackedHourglass: widths {list(widths)}, depths {list(depths)}, stacks {stacks}, stem {stem}, "
                f"out_channels {out_channels}; give as many depths as widths, two at least, and positive numbers"
            )
        width = widths[0]
        self.stem = nn.Sequential(_convolution(3, stem, size=7, stride=2), ResidualBlock(stem, width, stride=2))
        self.hourglasses = nn.ModuleList(Hourglass(widths=widths, depths=depths) for _ in range(stacks))
        self.outputs = nn.ModuleList(_convolution(width, out_channels) for _ in range(stacks))
        self.carries = nn.ModuleList(_projection(width, width) for _ in range(stacks - 1))
        self.returns = nn.ModuleList(_projection(out_channels, width) for _ in range(stacks - 1))
        self.joints = nn.ModuleList(ResidualBlock(width, width, stride=1) for _ in range(stacks - 1))
        self.channels, self.strides = [out_channels] * stacks, [4] * stacks

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map ``(B, out_channels, ceil(H / 4), ceil(W / 4))`` per hourglass, the last one the best."""
        maps = self.stem(images)  # (B, C, H / 4, W / 4)
        found: list[Tensor] = []
        for index, (hourglass, output) in enumerate(zip(self.hourglasses, self.outputs, strict=True)):
            found.append(output(hourglass(maps)))  # (B, out_channels, H / 4, W / 4)
            if index < len(self.joints):
                maps = F.relu(self.carries[index](maps) + self.returns[index](found[-1]))  # (B, C, H / 4, W / 4)
                maps = self.joints[index](maps)  # (B, C, H / 4, W / 4)
        return found


def _blocks(widths: Sequence[int], *, stride: int = 1) -> nn.Sequential:
    """Return residual blocks from each width to the next; the first one has the stride."""
    blocks = [
        ResidualBlock(before, after, stride=stride if index == 0 else 1)
        for index, (before, after) in enumerate(pairwise(widths))
    ]
    return nn.Sequential(*blocks)


def _convolution(before: int, after: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _projection(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
