"""Coarser levels behind any backbone, as SSD has them.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector" (arXiv:1512.02325), section 2.1 and figure 2: every further level
is made of the one before by a 1x1 convolution to half its width and a 3x3 convolution, mostly with stride 2. Separable:
Sandler et al. 2018, "MobileNetV2" (arXiv:1801.04381), section 6.2. The L2 norm of the finest level is that of Liu et
al. 2015, "ParseNet" (arXiv:1506.04579), section 3.3. Differs from the papers: a map that has become smaller than the
kernel is filled up with zeros, so that images of any size pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone
from detseg.nn.mobile import conv_norm, draw_normal

Kind = Literal["plain", "batch", "separable"]


class L2Norm(nn.Module):
    """Scale every cell of a map to a length of 1 over its channels, then every channel by a learnt factor.

    Args:
        channels: of the map.
        scale: what the factors start with; 20 in SSD.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, level: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``; a cell of zeros stays zero."""
        return self.weight[:, None, None] * F.normalize(level, dim=1)


class BackboneWithExtras(Backbone):
    """A backbone whose maps are followed by coarser ones.

    ``strides`` say how far cells lie apart; a level that is not padded has fewer cells than those of an image divided
    by it.

    Args:
        backbone: gives the first maps, finest first; registered as ``body``.
        extra: of each further level the channels, and of its larger convolution kernel, stride and padding, such as
            ``[[512, 3, 2, 1], [256, 3, 1, 0]]``.
        kind: ``plain`` as SSD has them; ``batch`` with a batch norm after each convolution, for levels that learn from
            random weights; ``separable``: SSDlite's, whose larger convolution is depthwise and followed by another 1x1.
        norm_momentum: share of a batch in the running statistics of the batch norms.
        l2_scale: first factors of an ``L2Norm`` on the finest level, or ``None`` for no such norm. The levels behind
            are made of the map without it.

    Raises:
        ValueError: there is no further level, a number does not fit, or the kind is unknown.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        extra: Sequence[Sequence[int]],
        kind: Kind = "plain",
        norm_momentum: float = 0.1,
        l2_scale: float | None = None,
    ) -> None:
        super().__init__()
        _check(extra, kind)
        self.body = backbone
        self.norm = nn.Identity() if l2_scale is None else L2Norm(backbone.channels[0], l2_scale)
        self.channels = backbone.channels + [width for width, *_ in extra]
        self.strides = list(backbone.strides)
        self.mean, self.std = backbone.mean, backbone.std
        self.extra = nn.ModuleList()
        before = self.channels[len(backbone.channels) - 1 :]
        for channels, (width, kernel, stride, padding) in zip(before, extra, strict=False):
            self.strides.append(self.strides[-1] * stride)
            if kind == "separable":
                self.extra.append(_separable(channels, width, kernel, stride, norm_momentum))
            else:
                norm = norm_momentum if kind == "batch" else None
                self.extra.append(_plain(channels, width, (kernel, stride, padding), norm))
        self.needed = [1 if kind == "separable" else kernel - 2 * padding for _, kernel, _, padding in extra]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's maps and the further levels, ``(B, channels[i], H_i, W_i)``."""
        levels = self.body(images)
        last = levels[-1]
        levels = [self.norm(levels[0]), *levels[1:]]
        for block, needed in zip(self.extra, self.needed, strict=True):
            height, width = last.shape[2:]
            if min(height, width) < needed:
                last = F.pad(last, (0, max(needed - width, 0), 0, max(needed - height, 0)))
            last = block(last)
            levels.append(last)
        return levels


def _check(extra: Sequence[Sequence[int]], kind: str) -> None:
    if kind not in ("plain", "batch", "separable"):
        raise ValueError(f"BackboneWithExtras: kind must be plain, batch or separable, not {kind!r}")
    wrong = [list(row) for row in extra if len(row) != 4 or min(row[:3]) < 1 or row[3] < 0 or row[0] % 2]
    if wrong or not extra:
        raise ValueError(
            f"BackboneWithExtras: extra is {[list(row) for row in extra]}; give every further level its channels "
            "(even), kernel, stride (1 or more each) and padding (0 or more), such as [[512, 3, 2, 1]]"
        )
    odd = [list(row) for row in extra if kind == "separable" and (row[1] % 2 == 0 or row[3] != row[1] // 2)]
    if odd:
        raise ValueError(
            f"BackboneWithExtras: {odd} do not fit kind separable, whose kernels are odd and padded by half of their "
            "size, as in [512, 3, 2, 1]"
        )


def _plain(channels: int, width: int, form: tuple[int, int, int], momentum: float | None) -> nn.Sequential:
    """Return the two convolutions of a level, ``form`` being kernel, stride and padding of the second."""
    kernel, stride, padding = form
    parts: list[nn.Module] = []
    for convolution in (
        nn.Conv2d(channels, width // 2, 1, bias=momentum is None),
        nn.Conv2d(width // 2, width, kernel, stride=stride, padding=padding, bias=momentum is None),
    ):
        nn.init.xavier_uniform_(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        norm = [] if momentum is None else [nn.BatchNorm2d(convolution.out_channels, momentum=momentum)]
        parts += [convolution, *norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def _separable(channels: int, width: int, kernel: int, stride: int, momentum: float) -> nn.Sequential:
    half = width // 2
    block = nn.Sequential(
        conv_norm(channels, half, size=1, momentum=momentum),
        conv_norm(half, half, size=kernel, stride=stride, depthwise=True, momentum=momentum),
        conv_norm(half, width, size=1, momentum=momentum),
    )
    draw_normal(block)
    return block
