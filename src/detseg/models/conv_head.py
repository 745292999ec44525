"""Heads of convolutions, for detectors that read regions from a single map.

He, Zhang, Ren and Sun 2015, `"Deep Residual Learning for Image Recognition" <https://arxiv.org/abs/1512.03385>`_,
appendix A: the map is that of conv4_x at stride 16, and conv5_x runs on every region before the mean over its cells.
Differs: regions are aligned, not pooled, where the config says so. ``ConvHead`` is a small stand-in without a paper.

Letters: R regions of all images, C channels, P cells of a region's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from detseg.nn import TorchvisionBackbone, freeze_batch_norm


class ResidualHead(nn.Module):
    """The last stage of a torchvision ResNet (``layer4``, conv5_x), then the mean over cells.

    Args:
        shape: of one region's features; (1024, 14, 14) for ResNet-50 and deeper.
        name: of ``torchvision.models``; the backbone's, up to ``layer3``, gives the map.
        weights: as for ``TorchvisionBackbone``, of whose network this is the rest.
        frozen_norm: batch norm keeps its statistics, scale and shift.
        v1_stride: stride 2 on the 1x1 convolution; see ``TorchvisionBackbone``.

    Raises:
        ValueError: the network has no ``layer4``, or one that takes another number of channels.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        name: str = "resnet50",
        weights: str | Path | None = None,
        frozen_norm: bool = True,
        v1_stride: bool = False,
    ) -> None:
        super().__init__()
        network = TorchvisionBackbone(name=name, weights=weights, strides=[16, 32], v1_stride=v1_stride)
        if "layer4" not in network.layer_names:
            raise ValueError(f"ResidualHead: {name} has no layer4; choose a ResNet of torchvision, such as resnet50")
        if shape[0] != network.channels[0]:
            raise ValueError(
                f"ResidualHead: layer4 of {name} takes {network.channels[0]} channels, but regions have {shape[0]}; "
                f"give the backbone the same name and strides=[16]"
            )
        self.layer4 = network.get_submodule("layer4")
        self.out_features = network.channels[1]
        if frozen_norm:
            freeze_batch_norm(self)

    def forward(self, regions: Tensor) -> Tensor:
        """Return ``(R, out_features)`` from ``(R, C, P, P)``."""
        result: Tensor = self.layer4(regions).mean(dim=(2, 3))  # (R, out_features)
        return result


class ConvHead(nn.Module):
    """3x3 convolutions with ReLU, then the mean over cells.

    Args:
        shape: of one region's features, such as (64, 7, 7).
        widths: channels of the convolutions.
        stride: of the first one.

    Raises:
        ValueError: there is no convolution.
    """

    def __init__(self, *, shape: Sequence[int], widths: Sequence[int] = (128, 128, 128), stride: int = 2) -> None:
        super().__init__()
        if not widths:
            raise ValueError("ConvHead: widths is empty; give the channels of at least one convolution")
        blocks = []
        for index, (before, after) in enumerate(pairwise([shape[0], *widths])):
            convolution = nn.Conv2d(before, after, 3, stride=stride if index == 0 else 1, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has a bias
            blocks.append(nn.Sequential(convolution, nn.ReLU(inplace=True)))
        self.convs = nn.Sequential(*blocks)
        self.out_features = widths[-1]

    def forward(self, regions: Tensor) -> Tensor:
        """Return ``(R, out_features)`` from ``(R, C, P, P)``."""
        result: Tensor = self.convs(regions).mean(dim=(2, 3))  # (R, out_features)
        return result
