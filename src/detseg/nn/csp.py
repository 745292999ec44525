"""Cross-stage partial networks: Wang et al., CSPNet, 2019, arXiv:1911.11929, in the form of present-day YOLO.

Built: the body that overviews of YOLO11 describe (arXiv:2410.17725, arXiv:2604.03349), with their names in brackets.
``CSPBlock`` (C3k2) sends half of the channels through a row of blocks and keeps what each of them gives; a block is two
3x3 convolutions, or another cross-stage block (C3k). The last stage pools over windows of 5, 9 and 13 cells (SPPF,
after He et al. 2014, arXiv:1406.4729), and half of its channels attend to each other's places (C2PSA, after Vaswani et
al. 2017, arXiv:1706.03762). Every convolution has batch norm and, but for attention's, SiLU. Sizes differ in depth and
width alone. Nothing here is copied from YOLO11's own code, whose weights do not load.

Letters: B images, C channels, H and W cells, D channels of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone

HEAD_CHANNELS = 64  # D, of the values in attention; queries and keys have half


def convolution(
    channels: int, width: int, size: int = 1, *, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Return a convolution without bias, batch norm and, where ``active``, SiLU.

    Args:
        channels: in.
        width: channels out.
        size: of the square kernel, odd; the padding keeps the number of cells but for the stride.
        stride: cells per step.
        groups: of channels that do not see each other; ``channels`` is a depthwise convolution.
        active: whether SiLU follows.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]
    return nn.Sequential(*layers, *([nn.SiLU(inplace=True)] if active else []))


def scaled_width(channels: int, *, width: float, max_channels: int) -> int:
    """Return how many channels a layer has in a network of some size: a multiple of 8, rounded up."""
    return math.ceil(min(channels, max_channels) * width / 8) * 8


def scaled_depth(blocks: int, *, depth: float) -> int:
    """Return how many blocks a row has in a network of some size, at least one."""
    return max(round(blocks * depth), 1)


class Bottleneck(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(channels, hidden, 3), convolution(hidden, channels, 3))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of the same shape."""
        result: Tensor = maps + self.body(maps)
        return result


class NestedBlock(nn.Module):
    """CSPNet's own form (C3k): half of the channels go through two bottlenecks, half around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        blocks = [Bottleneck(hidden, hidden) for _ in range(2)]
        self.through = nn.Sequential(convolution(channels, hidden), *blocks)
        self.around = convolution(channels, hidden)
        self.leave = convolution(2 * hidden, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of the same shape."""
        result: Tensor = self.leave(torch.cat((self.through(maps), self.around(maps)), dim=1))
        return result


class CSPBlock(nn.Module):
    """Half of the channels go through a row of blocks, and what each of them gives is kept (C3k2).

    Args:
        channels: in.
        width: channels out.
        hidden: channels of each half.
        depth: blocks in the row.
        nested: whether a block is a ``NestedBlock``, or a ``Bottleneck`` with half of the channels between.
    """

    def __init__(self, channels: int, width: int, *, hidden: int, depth: int, nested: bool) -> None:
        super().__init__()
        self.enter = convolution(channels, 2 * hidden)
        self.blocks = nn.ModuleList(
            NestedBlock(hidden) if nested else Bottleneck(hidden, hidden // 2) for _ in range(depth)
        )
        self.leave = convolution((2 + depth) * hidden, width)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, width, H, W)`` of ``(B, channels, H, W)``."""
        parts = list(self.enter(maps).chunk(2, dim=1))  # 2 x (B, hidden, H, W)
        for block in self.blocks:
            parts.append(block(parts[-1]))
        result: Tensor = self.leave(torch.cat(parts, dim=1))
        return result


class FastPyramidPooling(nn.Module):
    """Maxima over 5, 9 and 13 cells, each from the one before, beside the maps themselves (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = convolution(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.leave = convolution(channels // 2 * 4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of the same shape."""
        parts = [self.enter(maps)]  # (B, C / 2, H, W)
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        result: Tensor = self.leave(torch.cat(parts, dim=1))
        return result


class AttentionBlock(nn.Module):
    """Self-attention over the cells and a feed-forward part, each beside a shortcut, with batch norm.

    Where a cell lies is told by a depthwise 3x3 convolution of the values.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(channels // HEAD_CHANNELS, 1)
        while channels % self.heads:
            self.heads -= 1
        values = channels // self.heads
        self.parts = [values // 2, values // 2, values]
        self.project_in = convolution(channels, sum(self.parts) * self.heads, active=False)
        self.position = convolution(channels, channels, 3, groups=channels, active=False)
        self.project_out = convolution(channels, channels, active=False)
        self.feed = nn.Sequential(
            convolution(channels, 2 * channels), convolution(2 * channels, channels, active=False)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of the same shape."""
        maps = maps + self._attend(maps)
        result: Tensor = maps + self.feed(maps)
        return result

    def _attend(self, maps: Tensor) -> Tensor:
        batch, channels, height, width = maps.shape
        joint = self.project_in(maps).view(batch, self.heads, sum(self.parts), height * width)  # (B, heads, 2D, HW)
        query, key, value = joint.transpose(2, 3).split(self.parts, dim=3)  # (B, heads, HW, D / 2 or D)
        seen = F.scaled_dot_product_attention(query, key, value)  # (B, heads, HW, D)
        seen = seen.transpose(2, 3).reshape(batch, channels, height, width)  # (B, C, H, W)
        place = self.position(value.transpose(2, 3).reshape(batch, channels, height, width))  # (B, C, H, W)
        result: Tensor = self.project_out(seen + place)
        return result


class PartialAttention(nn.Module):
    """Half of the channels go through attention blocks, half around them (C2PSA)."""

    def __init__(self, channels: int, *, depth: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.enter = convolution(channels, 2 * hidden)
        self.blocks = nn.Sequential(*(AttentionBlock(hidden) for _ in range(depth)))
        self.leave = convolution(2 * hidden, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` of the same shape."""
        around, through = self.enter(maps).chunk(2, dim=1)  # (B, C / 2, H, W) each
        result: Tensor = self.leave(torch.cat((around, self.blocks(through)), dim=1))
        return result


class CSPBackbone(Backbone):
    """The body of present-day YOLO: a strided convolution and a cross-stage block per halving.

    Args:
        depth: factor of the blocks in a row; 0.5 in the sizes n, s and m, 1 in l and x.
        width: factor of all channels; 0.25, 0.5, 1, 1 and 1.5 in n, s, m, l and x.
        max_channels: channels of a layer before ``width``, at most; 1024 in n and s, 512 in the others.
        stem: channels of the first convolution (stride 2).
        widths: channels of each stage inside; stage i has stride ``4 * 2 ** i``.
        expansion: how many times as many each stage gives out.
        blocks: in the row of every cross-stage block, and of attention at the end.
        nested_from: stride from which on blocks are nested; 16 in n and s, 4 in the others.
        strides: of the maps wanted, ascending; stages beyond the last are not built.

    Raises:
        ValueError: the network has no map of a wanted stride, or not one expansion per stage.
    """

    def __init__(
        self,
        *,
        depth: float = 0.5,
        width: float = 0.25,
        max_channels: int = 1024,
        stem: int = 64,
        widths: Sequence[int] = (128, 256, 512, 1024),
        expansion: Sequence[int] = (2, 2, 1, 1),
        blocks: int = 2,
        nested_from: int = 16,
        strides: Sequence[int] = (8, 16, 32),
    ) -> None:
        super().__init__()
        known = [4 * 2**index for index in range(len(widths))]
        if len(expansion) != len(widths) or not strides or not set(strides) <= set(known):
            raise ValueError(
                f"CSPBackbone has stages of strides {known} with expansions {list(expansion)}; strides {list(strides)} "
                "must be among them, and there must be one expansion per stage"
            )
        channels = scaled_width(stem, width=width, max_channels=max_channels)
        rows = scaled_depth(blocks, depth=depth)
        self.stem = convolution(3, channels, 3, stride=2)
        stages: list[nn.Sequential] = []
        outputs: dict[int, int] = {}
        for stride, inner, factor in zip(known, widths, expansion, strict=True):
            if stride > max(strides):
                break
            inside = scaled_width(inner, width=width, max_channels=max_channels)
            outside = scaled_width(inner * factor, width=width, max_channels=max_channels)
            block = CSPBlock(inside, outside, hidden=inside // 2, depth=rows, nested=stride >= nested_from)
            stages.append(nn.Sequential(convolution(channels, inside, 3, stride=2), block))
            outputs[stride] = channels = outside
        stages[-1].append(FastPyramidPooling(channels)).append(PartialAttention(channels, depth=rows))
        self.stages = nn.ModuleList(stages)
        self.strides = list(strides)
        self.channels = [outputs[stride] for stride in strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``."""
        level, maps = self.stem(images), dict[int, Tensor]()  # (B, stem, H / 2, W / 2)
        for index, stage in enumerate(self.stages):
            level = maps[4 * 2**index] = stage(level)  # (B, C, H / s, W / s)
        return [maps[stride] for stride in self.strides]
