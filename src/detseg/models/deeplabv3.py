"""DeepLabV3: atrous convolutions of several rates side by side, and the whole image's average beside them.

Chen, Papandreou, Schroff & Adam 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation"
(arXiv:1706.05587).

Built (section 3.3, figure 5): on the last map of a ResNet with output stride 16 or 8, one 1x1 and three 3x3
convolutions of rates (6, 12, 18) or twice those, image pooling, 256 channels each with batch norm; joined by a 1x1
convolution; logits interpolated bilinearly to the image. A 3x3 convolution before the scores and the auxiliary head on
the stage before are those of torchvision's ``deeplabv3_resnet50``, to whose outputs and losses this is equal and whose
state dict loads.

Different: block4 has no multi-grid (section 3.2.1; torchvision has none either), and images smaller than two cells of
the last map are padded to that.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.models.auxiliary import AuxiliarySegmenter
from detseg.models.segmenter import (
    AnyMapLoss,
    Outputs,
    pad_to_multiple,
    resize_logits,
)
from detseg.nn import Backbone, Normalize
from detseg.structures import Target


class DeepLabV3(AuxiliarySegmenter):
    """The paper's network; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        backbone: gives the map that is looked at, and with ``auxiliary`` one before it.
        rates: of the three atrous convolutions: (6, 12, 18) at output stride 16, (12, 24, 36) at 8.
        width: channels of each branch and of the layers after them.
        dropout: probability after the branches are joined.
        auxiliary: makes the layers that score the map before the last, for the loss alone; ``None`` leaves them out.
        auxiliary_weight: factor of their terms; 0.5 in torchvision.
        weights: of torchvision's ``builder``, by name (downloads) or as the path of a state dict, or ``None``.
        builder: torchvision's function that has the same architecture.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.

    Raises:
        ValueError: the backbone gives no map for the auxiliary head.
        CheckpointMismatch: the weights do not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        rates: Sequence[int] = (12, 24, 36),
        width: int = 256,
        dropout: float = 0.5,
        auxiliary: Callable[..., nn.Module] | None = None,
        auxiliary_weight: float = 0.5,
        weights: str | Path | None = None,
        builder: str = "deeplabv3_resnet50",
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation, auxiliary_weight=auxiliary_weight)
        if auxiliary is not None and len(backbone.channels) < 2:
            raise ValueError(f"DeepLabV3: an auxiliary head needs a second map; the backbone has {backbone.strides}")
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.classifier = nn.Sequential(
            AtrousPyramid(channels=backbone.channels[-1], width=width, rates=rates, dropout=dropout),
            *_convolution(width, width, size=3),
            nn.Conv2d(width, num_classes, kernel_size=1),
        )
        self.add_auxiliary(auxiliary, weights=weights, builder=builder)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Outputs:
        """Return logits ``(B, K, H, W)`` of images of any size, with an auxiliary head also its own.

        Raises:
            ValueError: in training, a batch of a single image: the batch norm after image pooling has one value.
        """
        height, width = images.shape[-2:]
        if self.training and len(images) < 2:
            raise ValueError(
                "DeepLabV3 trains on batches of 2 images or more: the batch norm after image pooling sees one value "
                "per image; set data.batch_size to at least 2"
            )
        # Batch norm wants more than one cell
        images = pad_to_multiple(
            self.normalize(images, sizes), 1, least=2 * self.backbone.strides[-1]
        )  # (B, 3, H', W')
        maps = self.backbone(images)
        logits = resize_logits(self.classifier(maps[-1]), (images.shape[-2], images.shape[-1]))  # (B, K, H', W')
        return self.with_auxiliary(logits[:, :, :height, :width], maps)


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling (section 3.3); layers bear torchvision's names.

    Args:
        channels: of the map.
        width: channels of each branch and of the result.
        rates: of the 3x3 convolutions.
        dropout: probability at the end.
    """

    def __init__(self, *, channels: int, width: int, rates: Sequence[int], dropout: float) -> None:
        super().__init__()
        branches = [nn.Sequential(*_convolution(channels, width))]
        branches += [nn.Sequential(*_convolution(channels, width, size=3, rate=rate)) for rate in rates]
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_convolution(channels, width))
        self.convs = nn.ModuleList([*branches, pooled])
        self.project = nn.Sequential(*_convolution(len(self.convs) * width, width), nn.Dropout(dropout))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, width, h, w)`` of ``(B, C, h, w)``."""
        *local, pooled = [branch(maps) for branch in self.convs]
        whole = F.interpolate(pooled, size=maps.shape[-2:], mode="bilinear", align_corners=False)  # (B, width, h, w)
        result: Tensor = self.project(torch.cat([*local, whole], dim=1))
        return result


def _convolution(channels: int, width: int, *, size: int = 1, rate: int = 1) -> list[nn.Module]:
    padding = rate * (size // 2)
    return [
        nn.Conv2d(channels, width, size, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
