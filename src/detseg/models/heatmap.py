"""What CenterNet and CornerNet share: a head on each map of one stride, trained on heatmaps and read at their peaks.

Law and Deng 2018 (arXiv:1808.01244) and Zhou et al. 2019 (arXiv:1904.07850). A backbone that gives several maps of one
stride, such as a stacked hourglass, is supervised on each (Newell et al. 2016, arXiv:1603.06937); the last is read.

Letters: B images, K classes, G objects of all images, H and W rows and columns of a map, n candidates of one image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from detseg.nn.backbone import Backbone
from detseg.nn.normalize import Normalize, padding_mask
from detseg.ops.boxes import clip_boxes
from detseg.ops.nms import Suppression
from detseg.ops.peaks import check_kernel
from detseg.structures import Detections, Target

PRIOR = 0.1  # probability of every cell before training, as in both published codes

TruthT = TypeVar("TruthT")
Maps = dict[str, Tensor]
"""What one head says, by name: ``(B, C, H, W)`` each."""


@dataclass
class HeatmapOutputs:
    """What the network says about every cell.

    Attributes:
        stacks: the maps of each head, the last one the best.
        stride: pixels per cell.
        image_size: (height, width) of the padded images.
    """

    stacks: list[Maps]
    stride: int
    image_size: tuple[int, int]

    def read(self, name: str) -> Tensor:
        """Return a map of the last head in single precision."""
        return self.stacks[-1][name].float()


class HeatmapDetector(nn.Module, ABC, Generic[TruthT]):
    """The composition that detectors of keypoints share.

    Args:
        num_classes: foreground classes.
        backbone: gives maps of one stride.
        heads: one per map; each turns ``(B, C, H, W)`` into named maps.
        nms: of the detections of one image, or ``None`` for none.
        peak_kernel: odd side in cells of the window in which a peak is the largest.
        score_threshold: detections must score higher, in [0, 1).
        max_detections: how many detections per image stay.

    Raises:
        ValueError: the maps have several strides, or ``peak_kernel`` is even.
    """

    backbone: Backbone

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        heads: Iterable[nn.Module],
        nms: Suppression | None,
        peak_kernel: int,
        score_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        check_kernel(f"{type(self).__name__}, peak_kernel", peak_kernel)
        if len(set(backbone.strides)) != 1:
            raise ValueError(
                f"{type(self).__name__}: the backbone gives maps of strides {backbone.strides}, but peaks are read "
                "from one; merge them with detseg.nn.DeepAggregation, or ask for one stride"
            )
        self.num_classes = num_classes
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.nms = nms
        self.peak_kernel = peak_kernel
        self.score_threshold = score_threshold
        self.max_detections = max_detections

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None
    ) -> HeatmapOutputs:
        """Run the network on ``(B, 3, H, W)`` RGB in [0, 1]; ``targets`` are not read. See ``Detector.forward``."""
        levels = self.backbone(self.normalize(images, sizes))  # S x (B, C, H / s, W / s)
        stacks = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        return HeatmapOutputs(stacks, self.backbone.strides[0], (images.shape[2], images.shape[3]))

    def loss(self, outputs: HeatmapOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return the terms of the paper by name, scalars, each the mean over the heads; see ``Detector.loss``."""
        truth = self.truth(outputs, targets)
        found = [self.terms(maps, truth) for maps in outputs.stacks]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}

    @abstractmethod
    def truth(self, outputs: HeatmapOutputs, targets: list[Target]) -> TruthT:
        """Return what the maps of a batch shall say."""

    @abstractmethod
    def terms(self, maps: Maps, truth: TruthT) -> dict[str, Tensor]:
        """Return the loss terms of one head by name, weighted."""

    @abstractmethod
    def predict(self, outputs: HeatmapOutputs, sizes: Tensor) -> list[Detections]:
        """Return detections per image; see ``Detector.predict``."""

    def select(self, boxes: Tensor, scores: Tensor, labels: Tensor, sizes: Tensor) -> list[Detections]:
        """Return the best candidates of each image that score high enough, after NMS where there is one.

        Args:
            boxes: ``(B, n, 4)`` xyxy pixels.
            scores: ``(B, n)`` in [0, 1], descending.
            labels: ``(B, n)`` int64.
            sizes: ``(B, 2)`` valid height and width.
        """
        boxes, found = clip_boxes(boxes, sizes), []
        for box, score, label, high in zip(boxes, scores, labels, scores > self.score_threshold, strict=True):
            box, score, label = box[high], score[high], label[high]  # (n', 4), (n',), (n',)
            if self.nms is not None:
                keep, score = self.nms(box, score, label)  # (k,) each
                box, label = box[keep], label[keep]
            best = slice(self.max_detections)
            found.append(Detections(boxes=box[best], scores=score[best], labels=label[best]))
        return found


def blank_padding(heat: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """Return logits ``(B, K, H, W)`` with -inf in cells that begin beyond the valid ``sizes`` (B, 2) in pixels.

    The lower right corner of an object at the border lies in the first cell that begins there.
    """
    cells = sizes // stride + 1  # (B, 2)
    padding = padding_mask(cells, (heat.shape[2], heat.shape[3]))  # (B, H, W) or None
    return heat if padding is None else heat.masked_fill(padding[:, None], -torch.inf)


def read_cells(maps: Tensor, image: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return the values ``(..., C)`` of maps ``(B, C, H, W)`` at cells whose indices broadcast to ``(...)``."""
    return maps[image, :, rows, cols].float()  # (..., C)


def prediction(channels: int, width: int, outputs: int, *, prior: float | None = None) -> nn.Sequential:
    """Return a 3x3 convolution, ReLU and a 1x1 convolution, as both papers have it before every map.

    Args:
        channels: in.
        width: between the two.
        outputs: out.
        prior: probability at which the outputs start, for heatmaps; else they start at about 0.
    """
    last = nn.Conv2d(width, outputs, 1)
    bias = 0.0 if prior is None else -math.log((1 - prior) / prior)
    nn.init.constant_(last.bias, bias)  # type: ignore[arg-type]  # it has a bias
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), last)
