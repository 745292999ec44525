"""The second stage of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_: class and box of every region.

Sampling, loss and class-wise boxes are those of `"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_, section 2, the head
of two fully connected layers that of `"Feature Pyramid Networks" <https://arxiv.org/abs/1612.03144>`_, section 4.2.
Equal to torchvision's on the same weights. Differs: regions that lie in a crowd are no background examples, boxes are
decoded only for classes above the score threshold, and the loss is finite where no region is sampled.

Letters: B images, R regions of all images, S sampled regions of one image, M objects of one image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import compared
from detseg.losses.normalise import normaliser
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.hard_regions import hard_regions
from detseg.models.region_features import RegionAlign, RegionFeatures, stack_regions
from detseg.ops.boxes import box_iou, clip_boxes, large_enough
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Detections, Target
from detseg.targets.coders import BoxCoder
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.matchers import BETWEEN, IoUMatcher
from detseg.targets.samplers import BalancedSampler, HardSampler, Sampler

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of (prediction, target), summed to a scalar."""


@dataclass
class RegionSamples:
    """The regions that the second stage learns from.

    Attributes:
        boxes: per image ``(S, 4)`` xyxy pixels.
        labels: per image ``(S,)`` int64, 0 background, k + 1 for class k.
        objects: per image ``(S,)`` int64, the row of the matched object among the learnable ones; 0 for background.
        truth: per image ``(S, 4)``, the box of that object; the region itself for background.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    objects: list[Tensor]
    truth: list[Tensor]

    def take(self, rows: Sequence[Tensor]) -> RegionSamples:
        """Return these rows ``(S',)`` of each image."""
        return RegionSamples(
            *([part[row] for part, row in zip(parts, rows, strict=True)] for parts in vars(self).values())
        )


@dataclass
class RegionOutputs:
    """What one second stage says about the regions that it learns from.

    Attributes:
        samples: the regions.
        class_logits: ``(R, K + 1)`` of all images, background first.
        box_deltas: ``(R, K + 1, 4)``; class-agnostic ``(R, 1, 4)``.
    """

    samples: RegionSamples
    class_logits: Tensor
    box_deltas: Tensor


class RegionBranch(nn.Module):
    """Base of the second stages of ``TwoStageDetector``: what a region is, and where its object lies exactly."""

    def learn(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        strides: Sequence[int],
        sizes: Tensor,
    ) -> list[RegionOutputs]:
        """Return the outputs for regions drawn to learn from, one entry per stage.

        Args:
            features: per level ``(B, C, H, W)``.
            proposals: per image ``(N, 4)`` xyxy pixels.
            targets: one per image.
            strides: pixels per cell of each level.
            sizes: ``(B, 2)`` valid height and width.
        """
        raise NotImplementedError

    def losses(self, stages: Sequence[RegionOutputs]) -> dict[str, Tensor]:
        """Return the named loss terms, scalars, of what ``learn`` gave."""
        raise NotImplementedError

    def find(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], strides: Sequence[int], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections of each image, best first; see ``learn`` for the arguments."""
        raise NotImplementedError


class RegionHead(Protocol):
    """A module that turns the features of regions into numbers to classify: ``(R, *shape) -> (R, out_features)``."""

    out_features: int

    def __call__(self, regions: Tensor) -> Tensor:
        """Return ``(R, out_features)``."""
        ...


class TwoLayerHead(nn.Module):
    """Two fully connected layers on a flattened region.

    Args:
        shape: of one region's features, such as (256, 7, 7).
        width: of both layers.
        dropout: probability of dropping a number after each layer while training (Fast R-CNN: 0.5, as in VGG-16).
    """

    def __init__(self, *, shape: Sequence[int], width: int = 1024, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc6 = nn.Linear(math.prod(shape), width)
        self.fc7 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.out_features = width

    def forward(self, regions: Tensor) -> Tensor:
        """Return ``(R, width)`` from ``(R, C, P, P)``."""
        hidden = self.dropout(self.fc6(regions.flatten(1)).relu())  # (R, width)
        result: Tensor = self.dropout(self.fc7(hidden).relu())  # (R, width)
        return result


class BoxPredictor(nn.Module):
    """Logits of background and K classes, and box deltas for each of them or one for all.

    Args:
        in_features: numbers of a region.
        num_classes: K.
        class_agnostic: one box for all classes.
    """

    def __init__(self, *, in_features: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if class_agnostic else (num_classes + 1) * 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(R, K + 1)``, background first, and deltas ``(R, K + 1, 4)`` or ``(R, 1, 4)``."""
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float().unflatten(1, (-1, 4))


class BoxBranch(RegionBranch):
    """Classify regions and refine their boxes.

    Args:
        num_classes: K foreground classes.
        channels: of every level that regions are read from.
        pooling: features of a region; default RoIAlign to 7 x 7 from four levels.
        head: makes the layers between ``pooling`` and the outputs from the ``shape`` of a region's features; default
            two fully connected layers.
        class_agnostic: refine one box per region, not one per class.
        matcher: regions to objects; default: positive from IoU 0.5, background below.
        sampler: regions per image in the loss; default 512, at most a quarter of them positive. A ``HardSampler``
            chooses after a pass over all of them; see ``hard_regions``.
        coder: of the box deltas; default weights (10, 10, 5, 5).
        classification_loss: summed loss of (logits ``(R, K + 1)``, labels ``(R,)``).
        box_loss: summed loss of (deltas, wanted deltas), both ``(P, 4)``, or of boxes likewise.
        nms: among the boxes of one class; default threshold 0.5.
        score_threshold: lowest class probability of a detection.
        detections_per_image: the most that are kept.
        min_size: shortest side of a detection in pixels.
        crowd_overlap: share of a region inside a crowd from which it is no background example.
        chunk: regions in one pass where no gradient is kept, which bounds memory; ``None``: all.
        compress: makes a faster head for ``find`` from the trained one, such as ``nn.svd.TruncatedSVD``; losses always
            come from the head itself.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        pooling: RegionFeatures | None = None,
        head: Callable[..., RegionHead] = TwoLayerHead,
        class_agnostic: bool = False,
        matcher: IoUMatcher | None = None,
        sampler: Sampler | None = None,
        coder: BoxCoder | None = None,
        classification_loss: Loss | None = None,
        box_loss: Loss | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        min_size: float = 1e-2,
        crowd_overlap: float = 0.7,
        chunk: int | None = None,
        compress: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.pooling = pooling or RegionAlign(output_size=7, sampling_ratio=2)
        self.head = head(shape=self.pooling.shape(channels))
        self.class_agnostic = class_agnostic
        self.predictor = BoxPredictor(
            in_features=self.head.out_features, num_classes=num_classes, class_agnostic=class_agnostic
        )
        self.matcher = matcher or IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=False)
        self.sampler = sampler or BalancedSampler(size=512, positive_fraction=0.25)
        self.coder = coder or BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.classification_loss = classification_loss or nn.CrossEntropyLoss(reduction="sum")
        self.box_loss = box_loss or SmoothL1(beta=1 / 9)
        self.nms = nms or BatchedNMS(threshold=0.5)
        self.score_threshold = score_threshold
        self.detections_per_image = detections_per_image
        self.min_size = min_size
        self.crowd_overlap = crowd_overlap
        self.chunk = chunk
        self.compress = compress

    def forward(
        self, features: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``(R, K + 1)`` and deltas ``(R, K + 1, 4)`` or ``(R, 1, 4)`` of the regions of all images.

        Args:
            features: per level ``(B, C, H, W)``.
            boxes: per image ``(N, 4)``.
            strides: pixels per cell of each level.
        """
        logits, deltas = self.predictor(self.embed(features, stack_regions(boxes), strides))
        return logits, deltas

    def embed(
        self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int], *, compressed: bool = False
    ) -> Tensor:
        """Return what regions ``(R, 5)`` are classified by: the head's ``(R, out_features)``."""
        head: Callable[[Tensor], Tensor] = self.head
        if compressed and self.compress is not None:
            head = self.compress(cast(nn.Module, self.head))
        if self.chunk is None or torch.is_grad_enabled() or len(regions) <= self.chunk:
            return head(self.pooling(features, regions, strides))  # (R, out_features)
        parts = [head(self.pooling(features, some, strides)) for some in torch.split(regions, self.chunk)]
        return torch.cat(parts)  # (R, out_features)

    def learn(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        strides: Sequence[int],
        sizes: Tensor,
    ) -> list[RegionOutputs]:
        """Return the outputs for the regions that ``sample`` draws; see ``RegionBranch``."""
        samples = self.sample(proposals, targets)
        if isinstance(self.sampler, HardSampler):
            samples = samples.take(hard_regions(self, self.sampler, features, samples, strides))
        return [RegionOutputs(samples, *self(features, samples.boxes, strides))]

    def losses(self, stages: Sequence[RegionOutputs]) -> dict[str, Tensor]:
        """Return the loss terms of the one stage that ``learn`` gave."""
        (outputs,) = stages
        return self.loss(outputs.class_logits, outputs.box_deltas, outputs.samples)

    def find(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], strides: Sequence[int], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections of each image, best first; see ``RegionBranch``."""
        hidden = self.embed(features, stack_regions(proposals), strides, compressed=True)  # (R, out_features)
        logits, deltas = self.predictor(hidden)
        return self.detect(logits, deltas, proposals, sizes)

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> RegionSamples:
        """Draw the regions to learn from; the objects themselves join the proposals.

        Args:
            proposals: per image ``(N, 4)``.
            targets: one per image.
        """
        samples = RegionSamples([], [], [], [])
        for boxes, target in zip(proposals, targets, strict=True):
            objects = learnable(target)
            truth = objects.boxes.to(boxes)  # (M, 4)
            boxes = torch.cat([boxes, truth])  # (N + M, 4)
            match = self.matcher(box_iou(truth, boxes))  # (N + M,)
            crowd = inside_crowd(boxes, target, self.crowd_overlap)  # (N + M,)
            if crowd is not None:
                match = match.masked_fill(crowd & (match < 0), BETWEEN)
            rows = torch.cat(self.sampler((match >= 0).long() - (match == BETWEEN).long())).sort().values  # (S,)
            boxes, match = boxes[rows], match[rows]  # (S, 4), (S,)
            found, row = match >= 0, match.clamp(min=0)  # (S,), (S,)
            if len(truth) == 0:
                samples.labels.append(torch.zeros_like(match))
                samples.truth.append(boxes)
            else:
                samples.labels.append((objects.labels[row] + 1) * found)  # (S,)
                samples.truth.append(truth[row].where(found[:, None], boxes))  # (S, 4)
            samples.boxes.append(boxes)
            samples.objects.append(row)
        return samples

    def loss(self, logits: Tensor, deltas: Tensor, samples: RegionSamples) -> dict[str, Tensor]:
        """Return ``loss_classifier`` and ``loss_box``, both per sampled region (Fast R-CNN, eq. 1); see ``normaliser``.

        Args:
            logits: ``(R, K + 1)`` of the sampled regions.
            deltas: ``(R, K + 1, 4)``, or ``(R, 1, 4)`` where one box serves all classes.
            samples: the regions.
        """
        labels = torch.cat(samples.labels)  # (R,)
        positive = (labels > 0).nonzero().flatten()  # (P,)
        truth, regions = torch.cat(samples.truth)[positive], torch.cat(samples.boxes)[positive]  # (P, 4) each
        chosen = deltas[positive, self._column(labels[positive])]  # (P, 4)
        count = normaliser(torch.tensor(len(labels), device=logits.device))
        return {
            "loss_classifier": self.classification_loss(logits, labels) / count,
            "loss_box": self.box_loss(*compared(self.box_loss, self.coder, chosen, truth, regions)) / count,
        }

    def detect(self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Tensor) -> list[Detections]:
        """Return the detections of each image, best first.

        Args:
            logits: ``(R, K + 1)``.
            deltas: ``(R, K + 1, 4)`` or ``(R, 1, 4)``.
            proposals: per image ``(N, 4)``, together R.
            sizes: ``(B, 2)`` valid height and width.
        """
        return self.detect_scored(logits.softmax(dim=1)[:, 1:], deltas, proposals, sizes)

    def detect_scored(
        self, scores: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections of each image, best first, from scores in [0, 1] ``(R, K)``; see ``detect``."""
        counts = [len(boxes) for boxes in proposals]
        found = []
        parts = zip(torch.split(scores, counts), torch.split(deltas, counts), proposals, sizes, strict=True)
        for score, delta, boxes, size in parts:
            row, label = (score > self.score_threshold).nonzero().unbind(1)  # (D,), (D,); NaN never passes
            box = self.coder.decode(delta[row, self._column(label + 1)], boxes[row])  # (D, 4)
            box = clip_boxes(box, size)  # (D, 4)
            big = large_enough(box, self.min_size)  # (D,)
            box, label = box[big], label[big]  # (D', 4), (D',)
            keep, confidence = self.nms(box, score[row[big], label], label)  # (D'',) each
            best = keep[: self.detections_per_image]
            found.append(Detections(box[best], confidence[: len(best)], label[best]))
        return found

    def _column(self, labels: Tensor) -> Tensor:
        """Return which deltas of a region belong to each label, background 0."""
        return torch.zeros_like(labels) if self.class_agnostic else labels
