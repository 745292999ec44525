"""What stands between a Darknet and the predictions: the passthrough of YOLOv2, and YOLOv3's way from coarse to fine.

- ``BackboneWithPassthrough``: Redmon & Farhadi 2017, YOLO9000, arXiv:1612.08242, section 2 ("Fine-Grained Features")
  and section 3 ("Training for detection").
- ``BackboneWithConcat``: Redmon & Farhadi 2018, YOLOv3, arXiv:1804.02767, section 2.3, with the layers of its code.

Differs: sides that do not halve evenly are filled up with zeros (passthrough) or cut (up-sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone
from detseg.nn.darknet import dark_convolution


class BackboneWithPassthrough(Backbone):
    """One coarse map that has the fine one's cells stacked onto its channels.

    Args:
        backbone: gives two maps, the second of twice the first one's stride; registered as ``body``.
        width: channels of the three 3x3 convolutions.
        reduce: channels that a 1x1 convolution brings the fine map to before it is stacked; ``None``: as it is, the
            paper's text; its code has 64.

    Raises:
        ValueError: the backbone's strides are others.
    """

    def __init__(self, *, backbone: Backbone, width: int = 1024, reduce: int | None = None) -> None:
        super().__init__()
        if len(backbone.strides) != 2 or backbone.strides[1] != 2 * backbone.strides[0]:
            raise ValueError(
                f"BackboneWithPassthrough: the backbone has maps of strides {backbone.strides}; it must give two, the "
                "second of twice the first one's stride, such as [16, 32]"
            )
        self.body = backbone
        fine, coarse = backbone.channels
        self.deep = nn.Sequential(dark_convolution(coarse, width), dark_convolution(width, width))
        self.reduce = nn.Identity() if reduce is None else dark_convolution(fine, reduce, 1)
        self.join = dark_convolution(4 * (fine if reduce is None else reduce) + width, width)
        self.channels, self.strides = [width], [backbone.strides[1]]
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the one map ``(B, width, H / stride, W / stride)``."""
        fine, coarse = self.body(images)
        rows, columns = coarse.shape[2], coarse.shape[3]
        passed = self.reduce(fine)  # (B, C, h, w) with h = 2 rows or one less
        passed = F.pad(passed, (0, 2 * columns - passed.shape[3], 0, 2 * rows - passed.shape[2]))
        stacked = F.pixel_unshuffle(passed, 2)  # (B, 4 C, rows, columns): neighbours become channels
        return [self.join(torch.cat([stacked, self.deep(coarse)], dim=1))]


class BackboneWithConcat(Backbone):
    """Levels from coarse to fine: each map is joined by the up-sampled level below it, then convolved.

    Args:
        backbone: gives the maps, finest first, each of twice the stride before; registered as ``body``.
        widths: channels of each level, finest first; ``None``: half of the backbone's, as in YOLOv3's code.
        depth: convolutions per level, odd: 1x1 to the level's width, 3x3 to twice of it, and so on.

    Raises:
        ValueError: the depth is even, or there is not one width per map.
    """

    def __init__(self, *, backbone: Backbone, widths: Sequence[int] | None = None, depth: int = 5) -> None:
        super().__init__()
        chosen = [channels // 2 for channels in backbone.channels] if widths is None else list(widths)
        if depth % 2 == 0 or len(chosen) != len(backbone.channels):
            raise ValueError(
                f"BackboneWithConcat: depth is {depth} and widths {chosen}; the depth must be odd, and there must be "
                f"one width for each of the backbone's maps of strides {backbone.strides}"
            )
        self.body = backbone
        joined = [width + channels for width, channels in zip(chosen, backbone.channels, strict=True)]
        joined[-1] = backbone.channels[-1]  # the coarsest map has none below it
        self.levels = nn.ModuleList(_tower(*both, depth) for both in zip(joined, chosen, strict=True))
        self.laterals = nn.ModuleList(dark_convolution(coarse, fine, 1) for fine, coarse in pairwise(chosen))
        self.channels, self.strides = chosen, list(backbone.strides)
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one level per map of the backbone, finest first, ``(B, channels[i], H / s, W / s)``."""
        maps = self.body(images)
        found = [self.levels[-1](maps[-1])]
        for index in range(len(maps) - 2, -1, -1):
            below = self.laterals[index](found[0])  # (B, width, h, w)
            grown = F.interpolate(below, scale_factor=2.0, mode="nearest")[
                ..., : maps[index].shape[2], : maps[index].shape[3]
            ]
            found.insert(0, self.levels[index](torch.cat([grown, maps[index]], dim=1)))
        return found


def _tower(channels: int, width: int, depth: int) -> nn.Sequential:
    layers = []
    for index in range(depth):
        even = index % 2 == 0
        out = width if even else 2 * width
        layers.append(dark_convolution(channels, out, 1 if even else 3))
        channels = out
    return nn.Sequential(*layers)
