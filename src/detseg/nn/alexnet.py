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

from detseg.nn.vgg import PoolingEncoder, fully_connected_layers, initialise

KERNEL = 6
"""Cells a side that fc6 sees."""


class AlexNetEncoder(PoolingEncoder):
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

    stem_stride = 4

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
            self.load_published("alexnet", weights, {"fc.0": "classifier.1", "fc.3": "classifier.4"})

    def last(self, maps: Tensor) -> Tensor:
        """Return ``(B, D, h, w)``, what ``fc`` makes of the last map ``(B, C, h, w)``."""
        if not len(self.fc):
            return maps
        before = (KERNEL - 1) // 2
        around = (before, KERNEL - 1 - before)  # an even kernel has no cell in its middle
        return super().last(F.pad(maps, (*around, *around)))


def _halve() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)
