"""FCN: a classification network made fully convolutional, its coarse scores enlarged and fused with finer ones.

Long, Shelhamer & Darrell 2015, "Fully Convolutional Networks for Semantic Segmentation" (arXiv:1411.4038).

Built (figure 3): scores of every class by a 1x1 convolution on the last map (stride 32: FCN-32s); enlarged twofold by a
transposed convolution that starts as bilinear interpolation and learns, plus scores on pool4 (FCN-16s); the same once
more with pool3 (FCN-8s); then enlarged to the image by a fixed bilinear one. Layers that score start at zero (section
4.3), so a skip added to a trained coarser network adds nothing at first, and the answer nearly stays: enlarging in two
steps rounds the kinks of the interpolation, no more. Stage-wise training is ``init_from=<run of fcn32s>`` with
``model=fcn16s``. Over a dilated ResNet, with a convolution before the scores and an auxiliary head, it is torchvision's
``fcn_resnet50``, whose state dict loads.

Different: fc6 is padded by 3 cells and images to a multiple of 32, where the paper pads images by 100 pixels and crops;
the scores of pool3 and pool4 are not scaled before they are added.

B = images, C = channels, K = classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detseg.models.auxiliary import AuxiliarySegmenter
from detseg.models.segmenter import (
    AnyMapLoss,
    Outputs,
    pad_to_multiple,
    resize_logits,
)
from detseg.nn import Backbone, Normalize, TransposedConvolution
from detseg.structures import Target

LEARNT_INTERPOLATION = partial(TransposedConvolution, bilinear=True, bias=False)
"""The paper's layers that enlarge scores: bilinear at the start."""


class FCN(AuxiliarySegmenter):
    """FCN-32s, 16s and 8s; see the head of this file.

    Args:
        num_classes: classes of the semantic map, background included.
        backbone: gives as many maps as are fused, and with ``auxiliary`` one more before the last.
        skips: how many finer maps are fused: 0 is FCN-32s, 1 FCN-16s, 2 FCN-8s.
        head: makes the layers that score the last map from its channels and K; ``None`` is one 1x1 convolution.
        auxiliary: makes those that score the last map but one, for the loss alone; ``None`` leaves them out.
        auxiliary_weight: factor of their terms; 0.5 in torchvision.
        upsample: makes the layers that enlarge scores from channels, width and factor; ``None`` interpolates bilinearly
            to the size that is wanted, without padding the images, as torchvision does.
        learn_last: a last enlargement that starts bilinear learns too; in the paper it stays. Others always learn.
        weights: of torchvision's ``builder``, by name (downloads) or as the path of a state dict, or ``None``.
        builder: torchvision's function that has the same architecture.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.

    Raises:
        ValueError: the backbone gives too few maps, or their strides do not double where they are fused.
        CheckpointMismatch: the weights do not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        skips: int = 0,
        head: Callable[..., nn.Module] | None = None,
        auxiliary: Callable[..., nn.Module] | None = None,
        auxiliary_weight: float = 0.5,
        upsample: Callable[..., nn.Module] | None = LEARNT_INTERPOLATION,
        learn_last: bool = False,
        weights: str | Path | None = None,
        builder: str = "fcn_resnet50",
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation, auxiliary_weight=auxiliary_weight)
        self.skips, self.upsample = skips, upsample is not None
        _check_maps(backbone, skips, auxiliary is not None)
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        make = score if head is None else head
        self.classifier = make(channels=backbone.channels[-1], num_classes=num_classes)
        self.skip_scores = nn.ModuleList(
            score(channels=channels, num_classes=num_classes) for channels in self._fused(backbone.channels)
        )
        self.enlarge = nn.ModuleList()
        if upsample is not None:
            finest = backbone.strides[-1 - skips]
            make_layer = partial(upsample, channels=num_classes, width=num_classes)
            self.enlarge = nn.ModuleList(make_layer(factor=factor) for factor in [*[2] * skips, finest])
            if not learn_last and getattr(self.enlarge[-1], "bilinear", False):
                self.enlarge[-1].requires_grad_(False)  # what does not interpolate from the start has to learn
        self.add_auxiliary(auxiliary, weights=weights, builder=builder)

    def _fused(self, items: list[Any]) -> list[Any]:
        """Return the entries of the fused maps, coarsest first."""
        return items[-2 : -2 - self.skips : -1]

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Outputs:
        """Return logits ``(B, K, H, W)`` of images of any size, with an auxiliary head also its own."""
        height, width = images.shape[-2:]
        step = self.backbone.strides[-1]
        images = self.normalize(images, sizes)  # (B, 3, H, W)
        # Interpolation to any size needs no padding but of tiny images: batch norm wants more than one cell
        images = pad_to_multiple(images, step if self.upsample else 1, least=2 * step)  # (B, 3, H', W')
        maps = self.backbone(images)
        scores = self.classifier(maps[-1])  # (B, K, H / 32, W / 32)
        layers: list[Any] = list(self.enlarge) or [None] * (self.skips + 1)
        for layer, finer, scorer in zip(layers, self._fused(maps), self.skip_scores, strict=False):
            own = scorer(finer)  # (B, K, 2 h, 2 w)
            scores = own + _enlarge(layer, scores, own)
        logits = _enlarge(layers[-1], scores, images)[:, :, :height, :width]  # (B, K, H, W)
        return self.with_auxiliary(logits, maps)


class FCNHead(nn.Sequential):
    """torchvision's scoring layers: a 3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout, scores.

    Args:
        channels: of the map.
        num_classes: K.
        dropout: probability.
    """

    def __init__(self, *, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        width = channels // 4
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, num_classes, 1),
        )


def score(*, channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1x1 convolution that starts at zero (section 4.3)."""
    layer = nn.Conv2d(channels, num_classes, kernel_size=1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has a bias
    return layer


def _enlarge(layer: nn.Module | None, scores: Tensor, like: Tensor) -> Tensor:
    result: Tensor = resize_logits(scores, (like.shape[-2], like.shape[-1])) if layer is None else layer(scores)
    return result


def _check_maps(backbone: Backbone, skips: int, auxiliary: bool) -> None:
    strides = backbone.strides[-1 - skips :]
    doubled = [strides[0] * 2**level for level in range(len(strides))]
    count = max(skips + 1, 1 + auxiliary)
    if skips < 0 or len(backbone.strides) < count or strides != doubled:
        raise ValueError(
            f"FCN with {skips} skips{' and an auxiliary head' if auxiliary else ''} needs {count} maps whose "
            f"strides double where they are fused, the backbone has {backbone.strides}"
        )
