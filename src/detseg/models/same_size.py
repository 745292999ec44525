"""The first idea for segmenting at once: convolutions that keep the size of the image, and no pooling at all.

No paper; shown in Stanford's lectures CS231n (Li, Johnson & Yeung 2017, lecture 11), as what is too expensive at the
image's resolution or sees too little of it. Dilations that grow layer by layer, as in Yu & Koltun 2016, "Multi-Scale
Context Aggregation by Dilated Convolutions" (arXiv:1511.07122, section 2), let it see more for the same price.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter, pad_to_multiple
from detseg.nn import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detseg.structures import Target


class SameSize(SemanticSegmenter):
    """3x3 convolutions at the image's resolution, each with batch norm and ReLU, and scores; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        width: channels of every layer.
        dilations: one number per layer; all 1 is the plain form. A pixel sees ``2 sum(dilations) + 1`` pixels a side.
        mean: subtracted from RGB in [0, 1].
        std: divided by.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.

    Raises:
        ValueError: there is no layer.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 64,
        dilations: Sequence[int] = (1, 1, 1, 1, 1, 1, 1),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        if not dilations or min(dilations) < 1:
            raise ValueError(f"SameSize: dilations {list(dilations)} must name one layer or more, each at least 1")
        self.normalize = Normalize(mean, std)
        layers: list[nn.Module] = []
        for channels, dilation in zip([3] + [width] * len(dilations), dilations, strict=False):
            convolution = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        images = pad_to_multiple(self.normalize(images, sizes), 1, least=2)  # batch norm wants more than one pixel
        logits: Tensor = self.head(self.layers(images))  # (B, K, H, W)
        return logits[:, :, :height, :width]
