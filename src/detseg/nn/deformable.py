"""A 3x3 convolution with its norm, plain or deformable, as the up-sampling paths of CenterNet have it.

Deformable in the modulated form: Zhu, Hu, Lin and Dai, Deformable ConvNets v2, 2018, arXiv:1811.11168, section 3.2.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d


class DeformableConvolution(nn.Module):
    """A 3x3 convolution that reads where a plain one tells it to, weighing each place.

    Args:
        before: channels in.
        after: channels out.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = DeformConv2d(before, after, 3, padding=1, bias=False)
        self.places = nn.Conv2d(before, 27, 3, padding=1)  # for nine places: two offsets in cells, and one weight
        nn.init.zeros_(self.places.weight)  # it starts as a plain convolution of half the size
        nn.init.zeros_(cast(Tensor, self.places.bias))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, after, H, W)``, of the type that the plain convolution gives.

        Sampled and multiplied in float32: torchvision has no kernel for bfloat16 on a CPU, and places need the digits.
        """
        places = self.places(maps)  # (B, 27, H, W)
        offsets, weights = places.float().split([18, 9], dim=1)  # (B, 18, H, W), (B, 9, H, W)
        kernel = self.convolution.weight.float()  # (after, before, 3, 3)
        with torch.autocast(maps.device.type, enabled=False):
            result = deform_conv2d(maps.float(), offsets, kernel, padding=1, mask=weights.sigmoid())
        return cast(Tensor, result.to(places.dtype))


def convolution_block(before: int, after: int, *, deformable: bool) -> nn.Sequential:
    """Return a 3x3 convolution, batch norm and ReLU."""
    plain = nn.Conv2d(before, after, 3, padding=1, bias=False)
    convolution: nn.Module = DeformableConvolution(before, after) if deformable else plain
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))
