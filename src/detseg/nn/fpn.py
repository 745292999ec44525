"""Feature pyramid over any backbone.

Lin et al. 2017, "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144), as torchvision builds it: 1x1
lateral convolutions, nearest up-sampling and addition, a 3x3 convolution on each level. The coarser levels are those
of Lin et al. 2017 (pooling, footnote 1) or of RetinaNet (P6 and P7, arXiv:1708.02002 section 4.1). Not in the paper:
an optional norm after each convolution, for narrow pyramids trained from random weights.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from detseg.nn.backbone import Backbone


class BackboneWithFPN(Backbone):
    """A backbone whose maps are pyramid levels of equal width.

    Args:
        backbone: gives the maps, finest first; registered as ``body``.
        channels: of every level.
        extra: ``pool`` adds one level by taking every second cell (Faster R-CNN); ``p6p7`` adds two by strided
            convolutions of the backbone's last map (RetinaNet); ``p6p7_from_p5`` does so from the last pyramid level
            (FCOS, and torchvision's RetinaNet); ``None`` adds none.
        norm: ``batch``, ``group`` (8 groups) or ``None``, after each convolution of the pyramid.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        channels: int = 256,
        extra: Literal["pool", "p6p7", "p6p7_from_p5"] | None = None,
        norm: Literal["batch", "group"] | None = None,
    ) -> None:
        super().__init__()
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(
            backbone.channels,
            channels,
            extra_blocks=extra_levels(extra, backbone.channels[-1], channels),
            norm_layer=None if norm is None else _norm_layer(norm),
        )
        self.strides = with_extra_strides(backbone.strides, extra)
        self.channels = [channels] * len(self.strides)
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one level per stride, each ``(B, channels, H / stride, W / stride)``."""
        maps = OrderedDict((str(index), level) for index, level in enumerate(self.body(images)))
        return list(self.fpn(maps).values())


EXTRA = {None: 0, "pool": 1, "p6p7": 2, "p6p7_from_p5": 2}
"""Names of the ways to make coarser levels, and how many levels each adds."""


def extra_levels(extra: str | None, last: int, channels: int) -> ExtraFPNBlock | None:
    """Return the layers that make coarser levels.

    Args:
        extra: a key of ``EXTRA``.
        last: channels of the backbone's last map.
        channels: of the last level, and of the new ones.

    Raises:
        ValueError: there is no such way.
    """
    if extra not in EXTRA:
        raise ValueError(f"extra must be pool, p6p7, p6p7_from_p5 or null, not {extra!r}")
    if extra is None:
        return None
    if extra == "pool":
        return LastLevelMaxPool()
    block = LastLevelP6P7(last if extra == "p6p7" else channels, channels)
    block.use_P5 = extra == "p6p7_from_p5"  # torchvision guesses it from the widths, which may be equal by chance
    return block


def with_extra_strides(strides: list[int], extra: str | None) -> list[int]:
    """Return the strides of a backbone's maps and those of the coarser levels, each twice the one before."""
    return strides + [strides[-1] * 2 ** (step + 1) for step in range(EXTRA[extra])]


def _norm_layer(norm: str) -> type[nn.Module]:
    kinds: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "group": GroupNorm8}
    if norm not in kinds:
        raise ValueError(f"norm must be batch, group or null, not {norm!r}")
    return kinds[norm]


class GroupNorm8(nn.GroupNorm):
    """Group norm (Wu & He 2018) with 8 groups, built from the number of channels as batch norm is."""

    def __init__(self, channels: int) -> None:
        super().__init__(8, channels)
