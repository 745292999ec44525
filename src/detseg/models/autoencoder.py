"""A convolutional encoder and decoder without skips: all that the answer knows has gone through the smallest map.

Masci, Meier, Ciresan & Schmidhuber 2011, "Stacked Convolutional Auto-Encoders for Hierarchical Feature Extraction"
(ICANN).

Built: convolutions and max poolings, then enlargement and convolutions, as that paper's auto-encoder has them; the last
layer gives scores of classes. Different: it learns classes, where the paper reconstructs the image and then classifies
it; batch norm and ReLU in place of a scaled tanh. The baseline for what skips (U-Net), switches (SegNet) and dilation
add.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter, pad_to_multiple
from detseg.nn import IMAGENET_MEAN, IMAGENET_STD, Normalize, TransposedConvolution
from detseg.ops.upsampling import pool_with_switches
from detseg.structures import Target


class Autoencoder(SemanticSegmenter):
    """See the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        widths: channels of the encoder's stages, each ended by a 2x2 max pooling; the decoder's are the same, reversed.
        upsample: makes the layer that doubles a map from channels, width and factor.
        mean: subtracted from RGB in [0, 1].
        std: divided by.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        upsample: Callable[..., nn.Module] = TransposedConvolution,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        self.normalize = Normalize(mean, std)
        self.stride = 2 ** len(widths)
        self.encoder = nn.ModuleList(
            _convolution(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        backwards = [*reversed(widths)]
        self.enlarge = nn.ModuleList(upsample(channels=width, width=width, factor=2) for width in backwards)
        self.decoder = nn.ModuleList(
            _convolution(before, after) for before, after in zip(backwards, [*backwards[1:], widths[0]], strict=True)
        )
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        maps = pad_to_multiple(self.normalize(images, sizes), self.stride, least=2 * self.stride)  # (B, 3, H', W')
        switches: list[Tensor | None] = []
        wanted = any(layer.needs_switches for layer in self.enlarge)
        for block in self.encoder:
            maps = block(maps)  # (B, C, h, w)
            maps, places = pool_with_switches(maps) if wanted else (F.max_pool2d(maps, 2), None)
            switches.append(places)
        for enlarge, block, places in zip(self.enlarge, self.decoder, reversed(switches), strict=True):
            maps = block(enlarge(maps, places))  # (B, C, 2 h, 2 w)
        logits: Tensor = self.head(maps)  # (B, K, H', W')
        return logits[:, :, :height, :width]


def _convolution(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
