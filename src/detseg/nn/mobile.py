"""Parts of mobile networks: MobileNetV3 as the body of a detector, and separable convolutions.

Howard et al. 2019, "Searching for MobileNetV3" (arXiv:1905.02244), section 6.3: a detector reads the expansion layer of
the last block at stride 16 (C4) and the last layer (C5), and may have half the channels after C4 (table 6, "reduced").
Separable convolutions as in Sandler et al. 2018, "MobileNetV2" (arXiv:1801.04381), section 6.2. Names, numbers of the
batch norms and first weights are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from detseg.nn.backbone import Backbone, published_weights
from detseg.nn.norm import freeze_batch_norm
from detseg.nn.weights import load_weights

NORM_EPS = 1e-3
"""Added to the variance by the batch norms of mobile networks."""


class MobileNetV3(Backbone):
    """MobileNetV3-Large cut at C4's expansion layer (672 channels, stride 16) and at its last layer (stride 32).

    Args:
        weights: ``default`` or a name of torchvision's for ``mobilenet_v3_large`` (both download), the path of its
            state dict, or ``None``. They need ``reduced_tail=False``.
        reduced_tail: half the channels after C4: 480 instead of 960 at C5.
        norm_momentum: share of a batch in the running statistics; torchvision trained its detector with 0.03.
        frozen_norm: batch norm keeps its statistics, scale and shift.

    Raises:
        CheckpointMismatch: the weights have other shapes, as published ones have where the tail is reduced.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        reduced_tail: bool = False,
        norm_momentum: float = 0.03,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        norm = mobile_norm(norm_momentum)
        network = torchvision.models.mobilenet_v3_large(weights=None, norm_layer=norm, reduced_tail=reduced_tail)
        draw_normal(network.features)
        network.classifier = nn.Identity()
        if weights is not None:
            state, mean, std = published_weights("mobilenet_v3_large", weights)
            self.mean, self.std = mean or self.mean, std or self.std
            load_weights(network, state, drop_head=True, source=f"mobilenet_v3_large {weights}")
        layers = network.features
        last = max(index for index, layer in enumerate(layers) if getattr(layer, "_is_cn", False))  # strided: opens C5
        self.features = nn.Sequential(
            nn.Sequential(*layers[:last], layers[last].block[0]),
            nn.Sequential(layers[last].block[1:], *layers[last + 1 :]),
        )
        self.channels = [layers[last].block[0].out_channels, layers[-1].out_channels]
        self.strides = [16, 32]
        if frozen_norm:
            freeze_batch_norm(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return C4 and C5, ``(B, 672, H / 16, W / 16)`` and ``(B, 960 or 480, H / 32, W / 32)``."""
        fine = self.features[0](images)
        return [fine, self.features[1](fine)]


def mobile_norm(momentum: float) -> Callable[..., nn.BatchNorm2d]:
    """Return what makes the batch norm of a mobile network from its channels."""
    return partial(nn.BatchNorm2d, eps=NORM_EPS, momentum=momentum)


def conv_norm(
    channels: int, width: int, *, size: int, stride: int = 1, depthwise: bool = False, momentum: float = 0.03
) -> nn.Module:
    """Return a convolution, a batch norm and a ReLU6.

    Args:
        channels: in.
        width: out; as many as in where it is depthwise.
        size: of the kernel; the border is padded, so that stride 1 keeps the size of the map.
        stride: of the convolution.
        depthwise: every channel has a kernel of its own.
        momentum: of the norm.
    """
    block: nn.Module = Conv2dNormActivation(
        channels,
        width,
        kernel_size=size,
        stride=stride,
        groups=channels if depthwise else 1,
        norm_layer=mobile_norm(momentum),
        activation_layer=nn.ReLU6,
    )
    return block


def draw_normal(module: nn.Module, std: float = 0.03) -> None:
    """Draw all convolutions of a module from N(0, std) without biases, as TensorFlow's SSDlite does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
