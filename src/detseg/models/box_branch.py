"""The second stage of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_: class and box of every region.

Sampling, loss and class-wise boxes are those of `"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_, section 2, the head
of two fully connected layers that of `"Feature Pyramid Networks" <https://arxiv.org/abs/1612.03144>`_, section 4.2.
Equal to torchvision's on the same weights. Differs: regions that lie in a crowd are no background examples, boxes are
decoded only for classes above the score threshold, and the loss is finite where no region is sampled.

Letters: B images, R regions of all images, S sampled regions of one image, M objects of one image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detseg.losses.normalise import normaliser
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.region_features import RegionAlign, stack_regions
from detseg.ops.boxes import box_iou, clip_boxes, large_enough
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Detections, Target
from detseg.targets.coders import BoxCoder
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.matchers import BETWEEN, IoUMatcher
from detseg.targets.samplers import BalancedSampler

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


class TwoLayerHead(nn.Module):
    """Two fully connected layers on a flattened region.

    Args:
        in_features: numbers in a region's features.
        width: of both layers.
    """

    def __init__(self, *, in_features: int, width: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, width)
        self.fc7 = nn.Linear(width, width)

    def forward(self, regions: Tensor) -> Tensor:
        """Return ``(R, width)`` from ``(R, C, P, P)``."""
        hidden = self.fc6(regions.flatten(1)).relu()  # (R, width)
        result: Tensor = self.fc7(hidden).relu()  # (R, width)
        return result


class BoxPredictor(nn.Module):
    """Logits of background and K classes, and box deltas for each of them."""

    def __init__(self, *, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, (num_classes + 1) * 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(R, K + 1)``, background first, and deltas ``(R, K + 1, 4)``."""
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float().unflatten(1, (-1, 4))


class BoxBranch(nn.Module):
    """Classify regions and refine their boxes.

    Args:
        num_classes: K foreground classes.
        channels: of every pyramid level.
        width: of the head's two layers.
        pooling: features of a region; default RoIAlign to 7 x 7 from four levels.
        matcher: regions to objects; default: positive from IoU 0.5, background below.
        sampler: regions per image in the loss; default 512, at most a quarter of them positive.
        coder: of the box deltas; default weights (10, 10, 5, 5).
        classification_loss: summed loss of (logits ``(R, K + 1)``, labels ``(R,)``).
        box_loss: summed loss of (deltas, wanted deltas), both ``(P, 4)``.
        nms: among the boxes of one class; default threshold 0.5.
        score_threshold: lowest class probability of a detection.
        detections_per_image: the most that are kept.
        min_size: shortest side of a detection in pixels.
        crowd_overlap: share of a region inside a crowd from which it is no background example.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        width: int = 1024,
        pooling: RegionAlign | None = None,
        matcher: IoUMatcher | None = None,
        sampler: BalancedSampler | None = None,
        coder: BoxCoder | None = None,
        classification_loss: Loss | None = None,
        box_loss: Loss | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        min_size: float = 1e-2,
        crowd_overlap: float = 0.7,
    ) -> None:
        super().__init__()
        self.pooling = pooling or RegionAlign(output_size=7, sampling_ratio=2)
        self.head = TwoLayerHead(in_features=channels * self.pooling.output_size**2, width=width)
        self.predictor = BoxPredictor(in_features=width, num_classes=num_classes)
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

    def forward(
        self, features: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``(R, K + 1)`` and deltas ``(R, K + 1, 4)`` of the regions of all images.

        Args:
            features: per level ``(B, C, H, W)``.
            boxes: per image ``(N, 4)``.
            strides: pixels per cell of each level.
        """
        regions = self.pooling(features, stack_regions(boxes), strides)  # (R, C, P, P)
        logits, deltas = self.predictor(self.head(regions))
        return logits, deltas

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
            deltas: ``(R, K + 1, 4)`` likewise.
            samples: the regions.
        """
        labels = torch.cat(samples.labels)  # (R,)
        positive = (labels > 0).nonzero().flatten()  # (P,)
        wanted = self.coder.encode(torch.cat(samples.truth)[positive], torch.cat(samples.boxes)[positive])  # (P, 4)
        count = normaliser(torch.tensor(len(labels), device=logits.device))
        return {
            "loss_classifier": self.classification_loss(logits, labels) / count,
            "loss_box": self.box_loss(deltas[positive, labels[positive]], wanted) / count,
        }

    def detect(self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Tensor) -> list[Detections]:
        """Return the detections of each image, best first.

        Args:
            logits: ``(R, K + 1)``.
            deltas: ``(R, K + 1, 4)``.
            proposals: per image ``(N, 4)``, together R.
            sizes: ``(B, 2)`` valid height and width.
        """
        scores = logits.softmax(dim=1)[:, 1:]  # (R, K)
        counts = [len(boxes) for boxes in proposals]
        found = []
        parts = zip(torch.split(scores, counts), torch.split(deltas[:, 1:], counts), proposals, sizes, strict=True)
        for score, delta, boxes, size in parts:
            row, label = (score > self.score_threshold).nonzero().unbind(1)  # (D,), (D,); NaN never passes
            box = clip_boxes(self.coder.decode(delta[row, label], boxes[row]), size)  # (D, 4)
            big = large_enough(box, self.min_size)  # (D,)
            box, confidence, label = box[big], score[row, label][big], label[big]
            keep = self.nms(box, confidence, label)[: self.detections_per_image]  # (D',)
            found.append(Detections(box[keep], confidence[keep], label[keep]))
        return found
