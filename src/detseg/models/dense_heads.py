"""Parts of dense detectors' heads: the tower of Lin et al. 2017 (arXiv:1708.02002, figure 3), its start, its layout.

Letters: B images, N references of one image over all levels, A references per cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from detseg.nn.backbone import Backbone
from detseg.targets.lattice import References

PRIOR = 0.01  # foreground probability of every class before training (Lin et al. 2017, section 4.1)


def conv_tower(channels: int, depth: int, *, groups: int | None, nested: bool) -> nn.Sequential:
    """Return the 3x3 convolutions before a prediction, each with group norm where ``groups`` is given, and a ReLU.

    Args:
        channels: in and out.
        depth: how many convolutions.
        groups: of the group norm, or ``None`` for none.
        nested: each convolution with its norm and ReLU in a ``Sequential`` of its own, as the keys of torchvision's
            RetinaNet have it (``conv.0.0.weight``), or all in one row, as its FCOS has it (``conv.0.weight``).

    Raises:
        ValueError: the channels cannot be parted into groups.
    """
    if groups is not None and channels % groups:
        raise ValueError(f"conv_tower: {channels} channels cannot be parted into {groups} groups; change one of them")
    blocks = []
    for _ in range(depth):
        # RetinaNet v2 drops the bias before a norm, FCOS keeps it: as their published weights have it.
        block: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1, bias=groups is None or not nested)]
        block += [] if groups is None else [nn.GroupNorm(groups, channels)]
        blocks.append([*block, nn.ReLU(inplace=True)])
    rows = [nn.Sequential(*block) for block in blocks] if nested else [part for block in blocks for part in block]
    return nn.Sequential(*rows)


def initialise_head(head: nn.Module, prediction: nn.Conv2d | None = None) -> None:
    """Draw all convolutions from N(0, 0.01) and start the classes at probability 0.01 (Lin et al., section 4.1)."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if prediction is not None and prediction.bias is not None:
        nn.init.constant_(prediction.bias, -math.log((1 - PRIOR) / PRIOR))


def flatten_level(level: Tensor, width: int) -> Tensor:
    """Turn a prediction ``(B, A * width, H, W)`` into ``(B, H * W * A, width)``; no copy where channels come last."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, width)  # (B, H * W * A, width)


def one_width(backbone: Backbone) -> int:
    """Return the width of all levels.

    Raises:
        ValueError: the levels differ in width, so no head can be shared by them.
    """
    if len(set(backbone.channels)) != 1:
        raise ValueError(
            f"the levels of the backbone have {backbone.channels} channels, but one head serves all; "
            "give them one width with detseg.nn.BackboneWithFPN"
        )
    return backbone.channels[0]


def check_levels(references: References, backbone: Backbone, counts: Sequence[int]) -> int:
    """Return how many references a cell has.

    Raises:
        ValueError: there is not one count per level, or they differ.
    """
    if len(counts) != len(backbone.strides) or len(set(counts)) != 1:
        raise ValueError(
            f"{references} has {list(counts)} references per cell on its levels; the backbone has levels of strides "
            f"{backbone.strides}: give one list of sizes per level, all of one length"
        )
    return counts[0]
