"""Path aggregation over any backbone: Liu et al., Path Aggregation Network, 2018, arXiv:1803.01534, section 3.1.

Built: a feature pyramid's way down from coarse to fine levels, and the paper's second way up again, so that fine detail
reaches the coarse levels in few steps. Differs from the paper as YOLO since its fourth version does (arXiv:2004.10934):
neighbours are joined side by side and not added, and a cross-stage block (see ``nn/csp.py``) reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone
from detseg.nn.csp import CSPBlock, convolution, scaled_depth, scaled_width
from detseg.nn.fpn import extra_levels, with_extra_strides


class BackboneWithPAN(Backbone):
    """A backbone whose maps are read down and up again.

    Args:
        backbone: gives the maps, finest first, each of twice the stride of the one before; registered as ``body``.
        channels: of the levels, one number each, or one for all, which heads that are shared by all levels need.
        depth: factor of ``blocks``; see ``CSPBackbone``.
        width: factor of ``channels``, likewise.
        max_channels: channels of a level before ``width``, at most, likewise.
        blocks: in the row of every cross-stage block.
        nested_from: stride from which on blocks are nested; 32 in YOLO's sizes n and s, 8 in the others. On the way
            down the stride of the finer level counts.
        extra: coarser levels, made from the last level or map as ``BackboneWithFPN`` does.

    Raises:
        ValueError: there is not one number of channels per level, strides do not double, or ``extra`` is unknown.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        channels: int | Sequence[int] = (256, 512, 1024),
        depth: float = 0.5,
        width: float = 0.25,
        max_channels: int = 1024,
        blocks: int = 2,
        nested_from: int = 32,
        extra: Literal["pool", "p6p7", "p6p7_from_p5"] | None = None,
    ) -> None:
        super().__init__()
        strides, count = list(backbone.strides), len(backbone.strides)
        chosen = [channels] * count if isinstance(channels, int) else list(channels)
        doubling = all(coarse == 2 * fine for fine, coarse in pairwise(strides))
        if len(chosen) != count or not doubling:
            raise ValueError(
                f"BackboneWithPAN: channels are {chosen} and the backbone's strides {strides}; give one number of "
                "channels per level, and strides of which each is twice the one before"
            )
        own = [scaled_width(value, width=width, max_channels=max_channels) for value in chosen]
        rows = scaled_depth(blocks, depth=depth)
        inner = [*own[:-1], backbone.channels[-1]]  # channels on the way down; the coarsest map is read as it is

        def block(level: int, into: int) -> CSPBlock:
            nested = strides[level] >= nested_from
            return CSPBlock(into, own[level], hidden=own[level] // 2, depth=rows, nested=nested)

        self.body = backbone
        self.down = nn.ModuleList(block(i, inner[i + 1] + backbone.channels[i]) for i in range(count - 1))
        self.reduce = nn.ModuleList(convolution(own[i], own[i], 3, stride=2) for i in range(count - 1))
        self.up = nn.ModuleList(block(i + 1, own[i] + inner[i + 1]) for i in range(count - 1))
        # One map has no neighbours: a block of its own gives it the width that was asked for.
        self.alone = block(0, backbone.channels[0]) if count == 1 else None
        self.extra = extra_levels(extra, backbone.channels[-1], own[-1])
        self.strides = with_extra_strides(strides, extra)
        self.channels = own + own[-1:] * (len(self.strides) - count)
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one level per stride, each ``(B, channels[i], H / strides[i], W / strides[i])``."""
        maps: list[Tensor] = self.body(images)
        levels = list(maps)
        if self.alone is not None:
            levels = [self.alone(levels[0])]
        for index in reversed(range(len(self.down))):
            coarse = F.interpolate(levels[index + 1], size=levels[index].shape[2:], mode="nearest")
            levels[index] = self.down[index](torch.cat((coarse, levels[index]), dim=1))  # (B, C, H / s, W / s)
        for index, (reduce, up) in enumerate(zip(self.reduce, self.up, strict=True)):
            fine = reduce(levels[index])  # (B, C, H / 2s, W / 2s)
            levels[index + 1] = up(torch.cat((fine, levels[index + 1]), dim=1))
        if self.extra is not None:
            levels = self.extra(levels, maps, [str(stride) for stride in self.body.strides])[0]
        return levels
