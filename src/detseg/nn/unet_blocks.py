"""What stands at each level of a U-Net: two 3x3 convolutions, or a residual, dense or Inception block in their place.

Two convolutions: Ronneberger et al. 2015 (arXiv:1505.04597). Residual: Zhang et al. 2018, "Road Extraction by Deep
Residual U-Net" (arXiv:1711.10684), here with the activation after the sum. Dense: Jegou et al. 2017, "The One Hundred
Layers Tiramisu" (arXiv:1611.09326), two layers joined by a 1x1 convolution. Inception: Szegedy et al. 2015, "Going
Deeper with Convolutions" (arXiv:1409.4842), branches of 1x1, 3x3 and two 3x3, without the pooling branch.

Each reaches two cells to every side; without padding it costs 4 cells of a side, whichever it is.

B = images, C = channels, D = width, channels after.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DoubleConvolution(nn.Sequential):
    """Two 3x3 convolutions, each with an optional batch norm and a ReLU; without padding they cost 4 pixels."""

    def __init__(self, channels: int, width: int, *, padding: bool, norm: bool) -> None:
        layers: list[nn.Module] = []
        for before in (channels, width):
            layers += _convolution(before, width, padding=padding, norm=norm)
        super().__init__(*layers)


class ResidualDoubleConvolution(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the channels change; ReLU of the sum."""

    def __init__(self, channels: int, width: int, *, padding: bool, norm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*[*DoubleConvolution(channels, width, padding=padding, norm=norm)][:-1])
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, h, w)``, 4 less in height and width without padding."""
        body = self.body(maps)  # (B, D, h, w)
        result: Tensor = self.relu(body + crop(self.shortcut(maps), body))
        return result


class DenseBlock(nn.Module):
    """Two 3x3 convolutions that each see all maps before them; a 1x1 convolution joins everything."""

    def __init__(self, channels: int, width: int, *, padding: bool, norm: bool) -> None:
        super().__init__()
        growth = -(-width // 2)
        self.first = nn.Sequential(*_convolution(channels, growth, padding=padding, norm=norm))
        self.second = nn.Sequential(*_convolution(channels + growth, growth, padding=padding, norm=norm))
        self.join = nn.Sequential(*_convolution(channels + 2 * growth, width, size=1, padding=padding, norm=norm))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, h, w)``, 4 less in height and width without padding."""
        first = self.first(maps)  # (B, D / 2, h - 2, w - 2)
        joined = torch.cat([crop(maps, first), first], dim=1)  # (B, C + D / 2, h - 2, w - 2)
        second = self.second(joined)  # (B, D / 2, h - 4, w - 4)
        result: Tensor = self.join(torch.cat([crop(joined, second), second], dim=1))
        return result


class InceptionBlock(nn.Module):
    """Branches that see 1, 3 and 5 cells a side, beside one another: a quarter, a quarter and the rest of the width."""

    def __init__(self, channels: int, width: int, *, padding: bool, norm: bool) -> None:
        super().__init__()
        if width < 4:
            raise ValueError(f"InceptionBlock parts its width into quarters and a half: {width} is below 4")
        quarter = width // 4
        half = width - 2 * quarter
        self.point = nn.Sequential(*_convolution(channels, quarter, size=1, padding=padding, norm=norm))
        self.near = nn.Sequential(*_convolution(channels, quarter, padding=padding, norm=norm))
        self.far = DoubleConvolution(channels, half, padding=padding, norm=norm)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, h, w)``, 4 less in height and width without padding."""
        far = self.far(maps)  # (B, D / 2, h, w)
        return torch.cat([crop(self.point(maps), far), crop(self.near(maps), far), far], dim=1)


def crop(maps: Tensor, like: Tensor) -> Tensor:
    """Return the middle of ``maps`` ``(B, C, H, W)`` at the size of ``like``, which is at most as large."""
    top, left = (maps.shape[-2] - like.shape[-2]) // 2, (maps.shape[-1] - like.shape[-1]) // 2
    return maps[:, :, top : top + like.shape[-2], left : left + like.shape[-1]]


def _convolution(channels: int, width: int, *, size: int = 3, padding: bool, norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, size, padding=size // 2 if padding else 0, bias=not norm)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    return [*layers, nn.ReLU(inplace=True)]
