"""A dense front end and a context module of dilated convolutions that aggregate ever wider surroundings.

Yu & Koltun 2016, "Multi-Scale Context Aggregation by Dilated Convolutions" (arXiv:1511.07122).

Built: the front end (section 4) is VGG-16 without its last two poolings, layers after them dilated by 2 and 4, fc6 and
fc7 as convolutions, scores at an eighth of the resolution. The context module (section 3, table 1): 3x3 convolutions of
dilations 1, 1, 2, 4, 8, 16, 1 and a 1x1, in its basic form with K channels throughout, started as the identity
(equation 4), or in its large form, whose channels grow to 32 K (equation 5). Scores are interpolated bilinearly.

Different: maps are padded by zeros in every layer, where the paper pads the image once and lets maps shrink.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter, pad_to_multiple, resize_logits
from detseg.nn import Backbone, Normalize
from detseg.structures import Target

DILATIONS = (1, 1, 2, 4, 8, 16, 1)
"""Of table 1; a cell sees 67 cells a side."""

LARGE = (2, 2, 4, 8, 16, 32, 32)
"""Channels of the large form, in units of K."""


class DilatedNet(SemanticSegmenter):
    """The paper's front end with its context module; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        backbone: gives one map; the paper's is VGG-16 with output stride 8.
        dilations: of the context module's 3x3 layers; an empty list leaves the module out.
        large: the large form of the module.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        dilations: Sequence[int] = DILATIONS,
        large: bool = False,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.score = nn.Conv2d(backbone.channels[-1], num_classes, kernel_size=1)
        self.context = ContextModule(num_classes=num_classes, dilations=dilations, large=large) if dilations else None

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read."""
        height, width = images.shape[-2:]
        step = self.backbone.strides[-1]
        images = pad_to_multiple(self.normalize(images, sizes), step, least=2 * step)  # (B, 3, H', W')
        scores = self.score(self.backbone(images)[-1])  # (B, K, h, w)
        if self.context is not None:
            scores = self.context(scores)  # (B, K, h, w)
        return resize_logits(scores, (images.shape[-2], images.shape[-1]))[:, :, :height, :width]  # (B, K, H, W)


class ContextModule(nn.Sequential):
    """Layers of growing dilation from scores to scores (section 3).

    Args:
        num_classes: K.
        dilations: of the 3x3 layers, each followed by a ReLU; a 1x1 layer without one ends them.
        large: channels grow as in table 1's large form, which is for the paper's seven layers alone.
        noise: deviation of what is added to the initial weights of the large form (equation 5).

    Raises:
        ValueError: the large form with another number of layers.
    """

    def __init__(
        self, *, num_classes: int, dilations: Sequence[int] = DILATIONS, large: bool = False, noise: float = 0.01
    ) -> None:
        if large and len(dilations) != len(LARGE):
            raise ValueError(f"ContextModule: the large form has {len(LARGE)} dilations, not {len(dilations)}")
        widths = [num_classes * factor for factor in (LARGE if large else [1] * len(dilations))]
        layers: list[nn.Module] = []
        for before, after, dilation in zip([num_classes, *widths], widths, dilations, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
        layers.append(nn.Conv2d(widths[-1], num_classes, 1))
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                start_as_identity(layer, groups=num_classes, noise=noise if large else 0.0)


@torch.no_grad()
def start_as_identity(layer: nn.Conv2d, *, groups: int, noise: float = 0.0) -> None:
    """Set a convolution's weights so that it passes its input on.

    With as many channels before as after that is equation 4. Otherwise channels belong to ``groups``, and each is
    passed to those of its own group in equal parts (equation 5).

    Args:
        layer: of odd kernel.
        groups: K, of which both numbers of channels are multiples.
        noise: deviation of what is added, so that channels of one group come to differ.
    """
    before, after = layer.in_channels, layer.out_channels
    own = torch.arange(before) * groups // before  # (before,) the group of each channel
    same = own == (torch.arange(after) * groups // after)[:, None]  # (after, before)
    layer.weight.normal_(std=noise) if noise else layer.weight.zero_()
    centre = layer.kernel_size[0] // 2
    layer.weight[:, :, centre, centre] += same * (groups / before)
    if layer.bias is not None:
        layer.bias.zero_()
