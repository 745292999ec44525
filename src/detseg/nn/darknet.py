"""The bodies of the first three YOLOs, from random weights.

- ``YOLOv1Body``: the 24 convolutions of Redmon et al. 2016, arXiv:1506.02640, figure 3.
- ``Darknet19``: Redmon & Farhadi 2017, YOLO9000, arXiv:1612.08242, table 6.
- ``Darknet53``: Redmon & Farhadi 2018, YOLOv3, arXiv:1804.02767, table 1.

Without the layers that classify ImageNet. Widths and depths are arguments, so that small forms exist. Every activation
is leaky with slope 0.1 (2016, equation 2). Differs from the papers: maps of sides that are no multiple of the stride
are rounded up, and weights are drawn by He et al. 2015 (arXiv:1502.01852), since no weights of ImageNet are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detseg.nn.backbone import Backbone

SLOPE = 0.1
"""Of the leaky activations."""


def dark_convolution(channels: int, width: int, size: int = 3, *, stride: int = 1, norm: bool = True) -> nn.Sequential:
    """Return a convolution with batch norm (or a bias) and a leaky activation, as all of these networks have it.

    Args:
        channels: in.
        width: channels out.
        size: of the kernel, odd; the sides of a map become ``ceil(side / stride)``.
        stride: cells between neighbouring outputs.
        norm: batch norm in place of a bias.
    """
    convolution = nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, bias=not norm)
    nn.init.kaiming_normal_(convolution.weight, a=SLOPE, nonlinearity="leaky_relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    parts: list[nn.Module] = [convolution, nn.BatchNorm2d(width)] if norm else [convolution]
    return nn.Sequential(*parts, nn.LeakyReLU(SLOPE, inplace=True))


class _Stages(Backbone):
    """Stages in a row, of which the maps of some strides are given.

    Args:
        name: of the network, for messages.
        stages: one module per stride, finest first.
        widths: channels after each stage.
        own: the stride after each stage.
        strides: of the maps wanted; stages beyond the last are not built.
    """

    def __init__(
        self,
        *,
        name: str,
        stages: Sequence[nn.Module],
        widths: Sequence[int],
        own: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        if not strides or (absent := [stride for stride in strides if stride not in own]):
            raise ValueError(
                f"{name} has maps of strides {list(own)}, not {absent if strides else '[]'}; choose among them"
            )
        self.own = list(own[: own.index(strides[-1]) + 1])
        self.stages = nn.ModuleList(stages[: len(self.own)])
        self.strides = list(strides)
        self.channels = [widths[own.index(stride)] for stride in strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``."""
        maps = []
        for stage, stride in zip(self.stages, self.own, strict=True):
            images = stage(images)  # (B, width, H / stride, W / stride)
            if stride in self.strides:
                maps.append(images)
        return maps


class Darknet19(_Stages):
    """Table 6: stages of 3x3 convolutions, 1x1 ones of half the width between them, and max pooling between stages.

    Args:
        widths: channels of each stage; stage i has stride ``2 ** i``.
        depths: convolutions of each stage, odd: the 1x1 ones stand in between.
        strides: of the maps wanted, ascending.

    Raises:
        ValueError: one number per stage is missing, a depth is even, or there is no map of a wanted stride.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        depths: Sequence[int] = (1, 1, 3, 3, 5, 5),
        strides: Sequence[int] = (16, 32),
    ) -> None:
        if len(widths) != len(depths) or any(depth % 2 == 0 for depth in depths):
            raise ValueError(
                f"Darknet19: widths is {list(widths)} and depths {list(depths)}; give one of each per stage, depths odd"
            )
        stages, channels = [], 3
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if index else []
            layers.append(dark_convolution(channels, width))
            for _ in range(depth // 2):
                layers += [dark_convolution(width, width // 2, 1), dark_convolution(width // 2, width)]
            stages.append(nn.Sequential(*layers))
            channels = width
        own = [2**index for index in range(len(widths))]
        super().__init__(name="Darknet19", stages=stages, widths=widths, own=own, strides=strides)


class Darknet53(_Stages):
    """Table 1: stages of residual blocks, each begun by a 3x3 convolution of stride 2.

    Args:
        widths: channels of the first convolution and then of each stage; stage i (from 1) has stride ``2 ** i``.
        blocks: residual blocks of each stage.
        strides: of the maps wanted, ascending; the first convolution's map has stride 1.

    Raises:
        ValueError: one number per stage is missing, or there is no map of a wanted stride.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        blocks: Sequence[int] = (1, 2, 8, 8, 4),
        strides: Sequence[int] = (8, 16, 32),
    ) -> None:
        if len(widths) != len(blocks) + 1:
            raise ValueError(
                f"Darknet53: widths is {list(widths)} and blocks {list(blocks)}; give a width for the first "
                "convolution, then one width and one number of blocks per stage"
            )
        stages: list[nn.Module] = [dark_convolution(3, widths[0])]
        for index, count in enumerate(blocks):
            begin = dark_convolution(widths[index], widths[index + 1], stride=2)
            stages.append(nn.Sequential(begin, *(DarkResidual(widths[index + 1]) for _ in range(count))))
        own = [2**index for index in range(len(widths))]
        super().__init__(name="Darknet53", stages=stages, widths=widths, own=own, strides=strides)


class DarkResidual(nn.Module):
    """A 1x1 convolution to half the width and a 3x3 one back, added to the input; no activation after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(dark_convolution(width, width // 2, 1), dark_convolution(width // 2, width))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, width, H, W)``."""
        result: Tensor = maps + self.body(maps)
        return result


_FIGURE_3: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((64, 7, 2),),
    ((192, 3, 1),),
    ((128, 1, 1), (256, 3, 1), (256, 1, 1), (512, 3, 1)),
    (*((256, 1, 1), (512, 3, 1)) * 4, (512, 1, 1), (1024, 3, 1)),
    (*((512, 1, 1), (1024, 3, 1)) * 2, (1024, 3, 1), (1024, 3, 2), (1024, 3, 1), (1024, 3, 1)),
)
"""(width, kernel, stride) of the convolutions; max pooling by 2 stands between the groups."""


class YOLOv1Body(Backbone):
    """The 24 convolutions of YOLO, to a map of stride 64 (figure 3).

    Args:
        width: factor of all widths; 1 is the paper's.
        norm: batch norm after each convolution, which the paper does not have; without it and without the weights of
            ImageNet so deep a network hardly learns.
    """

    def __init__(self, *, width: float = 1.0, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, group in enumerate(_FIGURE_3):
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if index else []
            for full, size, stride in group:
                out = max(1, round(full * width))
                layers.append(dark_convolution(channels, out, size, stride=stride, norm=norm))
                channels = out
        self.layers = nn.Sequential(*layers)
        self.channels, self.strides = [channels], [64]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the one map ``(B, channels, ceil(H / 64), ceil(W / 64))``."""
        return [self.layers(images)]
