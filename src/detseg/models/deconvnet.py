"""DeconvNet: a classification network and its mirror picture, of unpooling and deconvolution.

Noh, Hong & Han 2015, "Learning Deconvolution Network for Semantic Segmentation" (arXiv:1505.04366).

Built (section 3, figure 2): VGG-16 with batch norm and its two fully connected layers as convolutions; a 7x7
deconvolution back to 512 channels; then per stage unpooling with switches and as many 3x3 deconvolutions as the encoder
has convolutions; a 1x1 convolution gives the scores. 252 million parameters.

Different: the fully connected layers and the deconvolution that undoes them keep the size of the map (7x7 cells with
padding, where the paper goes from 7x7 cells to one and back), so images of any size will do; they have no batch norm.
The paper segments object proposals one by one and combines them (sections 4.1, 4.3), in two stages of training; here
the whole image is segmented at once.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from detseg.models.segmenter import AnyMapLoss
from detseg.models.segnet import MirroredSegmenter
from detseg.nn import MaxUnpooling, MirroredDecoder, Normalize, VGGEncoder
from detseg.nn.undrawn import undrawn


class DeconvNet(MirroredSegmenter):
    """The paper's network; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        widths: channels of the encoder's stages.
        convolutions: of each stage.
        fully_connected: channels of fc6 and fc7.
        kernel: side of fc6 and of the deconvolution that undoes it, odd.
        dropout: probability after fc6 and fc7.
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
        fully_connected: int = 4096,
        kernel: int = 7,
        dropout: float = 0.5,
        upsample: Callable[..., nn.Module] = MaxUnpooling,
        weights: str | Path | None = None,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        self.backbone = VGGEncoder(
            widths=widths,
            convolutions=convolutions,
            norm=True,
            fully_connected=fully_connected,
            kernel=kernel,
            dropout=dropout,
            weights=weights,
        )
        self.normalize = Normalize(self.backbone.mean, self.backbone.std)
        back = undrawn(lambda: nn.ConvTranspose2d(fully_connected, widths[-1], kernel, padding=kernel // 2, bias=False))
        nn.init.kaiming_uniform_(back.weight.transpose(0, 1), nonlinearity="relu")
        self.back = nn.Sequential(back, nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
        self.decoder = MirroredDecoder(widths=widths, convolutions=convolutions, upsample=upsample, transposed=True)
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)
