"""SegNet: an encoder's poolings remember where their maxima were, and a mirrored decoder puts values back there.

Badrinarayanan, Kendall & Cipolla 2017, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation" (arXiv:1511.00561).

Built (section 3, figure 2): the 13 convolutions of VGG-16, each with batch norm and ReLU; unpooling with the encoder's
indices in place of learnt enlargement; as many 3x3 convolutions again, the last one gives the scores. No fully
connected layers, no skips but the indices. 29.4 million parameters.

Different: images are padded to a multiple of the stride; no local contrast normalisation of the input.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter, pad_to_multiple
from detseg.nn import MaxUnpooling, MirroredDecoder, Normalize, VGGEncoder
from detseg.structures import Target


class MirroredSegmenter(SemanticSegmenter):
    """Base of SegNet and DeconvNet: a VGG, its mirror image that reads the switches, and a head; see ``forward``."""

    backbone: VGGEncoder
    normalize: Normalize
    back: nn.Module
    """Between the two: what undoes the fully connected layers."""
    decoder: MirroredDecoder
    head: nn.Module

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        step = self.backbone.output_stride
        images = pad_to_multiple(self.normalize(images, sizes), step, least=2 * step)  # (B, 3, H', W')
        maps, switches = self.backbone.with_switches(images)
        logits: Tensor = self.head(self.decoder(self.back(maps), switches))  # (B, K, H', W')
        return logits[:, :, :height, :width]


class SegNet(MirroredSegmenter):
    """The paper's network; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        widths: channels of the encoder's stages.
        convolutions: of each stage.
        upsample: makes the layer that doubles a map from channels, width and factor; the paper's is max-unpooling.
        weights: of torchvision's ``vgg16_bn``: ``default`` or a name (both download), a path, or ``None``.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        convolutions: Sequence[int] = (2, 2, 3, 3, 3),
        upsample: Callable[..., nn.Module] = MaxUnpooling,
        weights: str | Path | None = None,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        self.backbone = VGGEncoder(widths=widths, convolutions=convolutions, norm=True, weights=weights)
        self.normalize = Normalize(self.backbone.mean, self.backbone.std)
        self.back = nn.Identity()
        self.decoder = MirroredDecoder(widths=widths, convolutions=convolutions, upsample=upsample, last=False)
        self.head = nn.Conv2d(widths[0], num_classes, 3, padding=1)
