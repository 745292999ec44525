"""A small residual network for narrow budgets. It has no paper of its own.

Blocks are ResNet's basic ones (He et al. 2015, arXiv:1512.03385, figure 5 left) with the stem reduced to one strided
3x3 convolution, so that 128-pixel images train on a CPU from random weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detseg.nn.backbone import Backbone


class TinyBackbone(Backbone):
    """A strided stem and residual stages at strides 4, 8, 16, ...; every convolution has a batch norm.

    Args:
        widths: channels of each stage; stage i has stride ``4 * 2 ** i``.
        depth: residual blocks per stage.
        stem: channels of the stem (stride 2).
        with_stem: give the stem's map (stride 2) as the first output too, as a U-Net decoder wants it.
        strides: of the maps wanted, ascending; stages beyond the last are not built. ``None`` gives all of them.

    Raises:
        ValueError: the network has no map of a wanted stride.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 64, 128, 256),
        depth: int = 1,
        stem: int = 16,
        with_stem: bool = False,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths = [width for index, width in enumerate(widths) if strides is None or 4 * 2**index <= strides[-1]]
        self.stem = nn.Sequential(*_convolution(3, stem, stride=2), nn.ReLU(inplace=True))
        stages, channels = [], stem
        for width in widths:
            blocks = [ResidualBlock(channels, width, stride=2)]
            blocks += [ResidualBlock(width, width, stride=1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stages = nn.ModuleList(stages)
        own = dict(zip([2 ** (index + 1) for index in range(len(widths) + 1)], [stem, *widths], strict=True))
        self.strides = list(own)[0 if with_stem else 1 :] if strides is None else list(strides)
        if absent := [stride for stride in self.strides if stride not in own]:
            raise ValueError(f"TinyBackbone has maps of strides {list(own)}, not {absent}; choose among those")
        self.channels = [own[stride] for stride in self.strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``."""
        maps = {2: self.stem(images)}  # (B, stem, H / 2, W / 2)
        for index, stage in enumerate(self.stages):
            maps[4 * 2**index] = stage(maps[2 * 2**index])  # (B, width, H / s, W / s)
        return [maps[stride] for stride in self.strides]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, width, stride=stride), nn.ReLU(inplace=True), *_convolution(width, width)
        )
        same = channels == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(channels, width, size=1, stride=stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, width, H / stride, W / stride)``."""
        result: Tensor = self.relu(self.body(maps) + self.shortcut(maps))
        return result


def _convolution(channels: int, width: int, *, size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(width)]
