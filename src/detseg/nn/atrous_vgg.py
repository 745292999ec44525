"""VGG-16 whose fc6 and fc7 are convolutions, the body of SSD.

Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556),
configuration D, as Liu et al. 2016 (SSD, arXiv:1512.02325, section 3) change it: pool5 is 3x3 with stride 1, and fc6
and fc7 are a dilated 3x3 and a 1x1 convolution whose weights are every third, fourth ... of the published ones. pool3
rounds up, so that 300 pixels give 38 cells at conv4_3, as in the authors' release and in torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detseg.nn.backbone import TorchvisionBackbone, published_weights

POOL3 = "16"
"""Name of the third pooling among torchvision's layers."""


class AtrousVGG16(TorchvisionBackbone):
    """VGG-16 up to conv5_3 under torchvision's names (``0``, ``2``, ...), then ``fc``; maps conv4_3 and fc7.

    Args:
        weights: ``default`` or a name of torchvision's for ``vgg16`` (both download), the path of its state dict, or
            ``None``. Where they have fc6 and fc7, and these are finite, the convolutions start from them.
        frozen_stages: the first n halvings are not trained, 1 is conv1 and conv2; the paper trains all.
    """

    def __init__(self, *, weights: str | Path | None = None, frozen_stages: int = 0) -> None:
        super().__init__(name="vgg16", weights=weights, strides=(8, 16), frozen_stages=frozen_stages)
        pool: Any = self.get_submodule(POOL3)
        pool.ceil_mode = True
        six = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)  # every third cell, and conv5_3 is twice as fine as pool5
        seven = nn.Conv2d(1024, 1024, 1)
        for layer in (six, seven):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has a bias
        pool5 = nn.MaxPool2d(3, stride=1, padding=1)
        self.fc = nn.Sequential(pool5, six, nn.ReLU(inplace=True), seven, nn.ReLU(inplace=True))
        self.channels[-1] = 1024
        if weights is not None:
            self.thin_out(published_weights("vgg16", weights)[0])

    @torch.no_grad()
    def thin_out(self, state: Mapping[str, Tensor]) -> None:
        """Start fc6 and fc7 from a classifier's layers; one that is missing or not finite leaves them as they are.

        Args:
            state: with ``classifier.0`` ``(4096, 512 * 7 * 7)`` and ``classifier.3`` ``(4096, 4096)``.
        """
        wanted = [f"classifier.{index}.{part}" for index in (0, 3) for part in ("weight", "bias")]
        # torchvision's IMAGENET1K_FEATURES, from the authors of SSD, has NaN there.
        if not all(name in state and bool(state[name][::4].isfinite().all()) for name in wanted):
            return
        six: Any = self.fc[1]
        seven: Any = self.fc[3]
        six.weight.copy_(state[wanted[0]].view(4096, 512, 7, 7)[::4, :, ::3, ::3])  # (1024, 512, 3, 3)
        seven.weight.copy_(state[wanted[2]][::4, ::4, None, None])  # (1024, 1024, 1, 1)
        six.bias.copy_(state[wanted[1]][::4])
        seven.bias.copy_(state[wanted[3]][::4])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return conv4_3 ``(B, 512, H / 8, W / 8)`` and fc7 ``(B, 1024, H / 16, W / 16)``."""
        conv4, conv5 = super().forward(images)
        return [conv4, self.fc(conv5)]
