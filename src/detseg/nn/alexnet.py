"""AlexNet whose fully connected layers are convolutions, the first body of FCN.

Krizhevsky, Sutskever & Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks", in the form of
torchvision, one column (Krizhevsky 2014, arXiv:1404.5997); made convolutional as by Long et al. 2015 (arXiv:1411.4038,
section 4.1).

Different: the first convolution is padded by 4 pixels and not 2, the poolings by one cell, so that every map has a side
that halves the one before and scores fall onto the pixels that they are about; fc6, 6x6, is padded so that maps keep
their size. Weights are torchvision's all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.nn.backbone import Backbone, published_weights
from detseg.nn.vgg import as_convolutions, fully_connected_layers, initialise
from detseg.nn.weights import load_weights

KERNEL = 6
"""Cells a side that fc6 sees."""


class AlexNetEncoder(Backbone):
    """AlexNet's convolutions, its poolings' maps at strides 8, 16 and 32, and fc7; layers bear torchvision's names.

    Args:
        strides: of the maps wanted, ascending.
        fully_connected: width of fc6 and fc7 as convolutions on the last map; 0 leaves them out.
        dropout: probability, after fc6 and fc7.
        weights: ``default`` or a name of torchvision's for ``alexnet`` (both download), the path of its state dict, or
            ``None``. fc6 and fc7 start from its classifier where they have its shape.

    Raises:
        ValueError: a stride is not there.
    """

    def __init__(
        self,
        *,
        strides: Sequence[int] = (8, 16, 32),
        fully_connected: int = 4096,
        dropout: float = 0.5,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        widths = {8: 64, 16: 192, 32: 256}
        absent = [stride for stride in strides if stride not in widths]
        if absent or not strides:
            raise ValueError(f"AlexNetEncoder has maps of strides {list(widths)}, not {absent or list(strides)}")
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=4), nn.ReLU(inplace=True), _halve(),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), _halve(),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), _halve(),
        )  # fmt: skip
        initialise(self.features)
        self.fc = fully_connected_layers(widths[32], fully_connected, KERNEL, padding=0, dropout=dropout)
        self.strides = list(strides)
        self.channels = [widths[stride] for stride in self.strides]
        if fully_connected and self.strides[-1] == 32:
            self.channels[-1] = fully_connected
        if weights is not None:
            self._load(weights)

    def _load(self, weights: str | Path) -> None:
        state, mean, std = published_weights("alexnet", weights)
        self.mean, self.std = mean or self.mean, std or self.std
        own = self.state_dict()
        layers = {f"fc.{ours}": f"classifier.{theirs}" for ours, theirs in ((0, 1), (3, 4))}
        fresh = {key: value for key, value in own.items() if key.startswith("fc.")}
        found = {key: value for key, value in state.items() if key.startswith("features.")}
        load_weights(self, fresh | found | as_convolutions(own, state, layers), source=f"alexnet {weights}")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per stride; see ``Backbone``. Sides should be multiples of 32."""
        maps, stride = {}, 4
        for layer in self.features:
            images = layer(images)
            if isinstance(layer, nn.MaxPool2d):
                stride *= 2
                maps[stride] = images  # (B, C, H / stride, W / stride)
        if len(self.fc):
            before = (KERNEL - 1) // 2
            around = (before, KERNEL - 1 - before)  # an even kernel has no cell in its middle
            maps[stride] = self.fc(F.pad(images, (*around, *around)))  # (B, fully_connected, H / 32, W / 32)
        return [maps[wanted] for wanted in self.strides]


def _halve() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)
