"""A present-day YOLO, as overviews describe YOLO11 (arXiv:2410.17725, arXiv:2604.03349), from published descriptions.

Built: a cross-stage body with pooling and attention at its end (``nn/csp.py``), a path aggregation neck
(``nn/pan.py``), and a head without anchors that predicts classes and boxes apart (YOLOX, Ge et al. 2021,
arXiv:2107.08430, section 2.1), the classes by depthwise convolutions. Each distance from a cell's centre to a side of
its box is a distribution over 0 to 15 strides (GFL, Li et al. 2020, arXiv:2006.04388). Boxes learn by CIoU
(arXiv:1911.08287), classes by binary cross entropy against what task-aligned assignment says that they shall score
(TOOD, Feng et al. 2021, arXiv:2108.07755). The five sizes have the parameters and operations that YOLO11 is published
with, see ``benchmarks/yolo_sizes.py``.

Differs from it: no line of its code is used and its weights do not load; images are normalised; IoU and not CIoU
aligns, as in TOOD; training has no mosaic by default.

Letters: B images, N cells of one image over all levels, K classes, n values per distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import BoxLoss, Coder
from detseg.losses.distribution import DistributionFocalLoss
from detseg.losses.iou import CIoULoss
from detseg.losses.quality import BCELoss, ClassificationLoss
from detseg.models.dense import AnyAssigner, DenseDetector, DenseOutputs
from detseg.models.dense_heads import PRIOR, flatten_level
from detseg.nn.backbone import Backbone
from detseg.nn.csp import convolution
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.points import CellGrid, DistanceCoder
from detseg.targets.task_aligned import TaskAlignedAssigner


class YOLOHead(nn.Module):
    """On every level, with weights of its own, one branch for classes and one for boxes.

    Args:
        channels: of each level.
        num_classes: K.
        bins: n, values per distance.
        box_width: channels in the box branch; ``None``: a quarter of the finest level's, at least 4 n.
        class_width: channels in the class branch; ``None``: the finest level's, or K (up to 100) where that is more.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        num_classes: int,
        bins: int,
        box_width: int | None = None,
        class_width: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        box = box_width or max(16, channels[0] // 4, 4 * bins)
        inner = class_width or max(channels[0], min(num_classes, 100))
        self.box_branches = nn.ModuleList(
            nn.Sequential(convolution(width, box, 3), convolution(box, box, 3), nn.Conv2d(box, 4 * bins, 1))
            for width in channels
        )
        self.class_branches = nn.ModuleList(
            nn.Sequential(
                convolution(width, width, 3, groups=width),
                convolution(width, inner),
                convolution(inner, inner, 3, groups=inner),
                convolution(inner, inner),
                _prediction(inner, num_classes),
            )
            for width in channels
        )

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """Return logits ``(B, N, K)``, those of the distances ``(B, N, 4 * n)``, and no quality."""
        logits, distances = [], []
        for level, box, classes in zip(levels, self.box_branches, self.class_branches, strict=True):
            logits.append(flatten_level(classes(level), self.num_classes))  # (B, H * W, K)
            distances.append(flatten_level(box(level), 4 * self.bins))  # (B, H * W, 4 * n)
        return torch.cat(logits, 1), torch.cat(distances, 1), None


class YOLO(DenseDetector):
    """The one-stage detector without anchors that assigns objects by its own predictions.

    Args:
        num_classes: foreground classes.
        backbone: levels of any widths, such as a ``BackboneWithPAN``'s.
        box_width: channels in the head's box branch; ``None`` gives YOLO11's.
        class_width: channels in the head's class branch; ``None`` gives YOLO11's.
        assigner: of cells to objects; ``None`` gives task alignment.
        coder: of boxes; ``None`` gives distances in strides from the centre of a cell.
        classification_loss: ``None`` gives binary cross entropy, against the assigner's quality.
        box_loss: of the boxes; ``None`` gives CIoU.
        distribution_loss: of the distances; ``None`` gives 16 values from 0 to 15 strides.
        loss_weights: factors of the terms ``classification``, ``box`` and ``distribution``; ``None`` gives YOLO11's
            published 0.5, 7.5 and 1.5.
        nms: ``None`` gives NMS per class at IoU 0.7.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per level go to NMS.
        max_detections: how many detections per image stay.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        box_width: int | None = None,
        class_width: int | None = None,
        assigner: AnyAssigner | None = None,
        coder: Coder | None = None,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        distribution_loss: DistributionFocalLoss | None = None,
        loss_weights: Mapping[str, float] | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.001,
        top_k: int = 1000,
        max_detections: int = 100,
    ) -> None:
        distribution = distribution_loss or DistributionFocalLoss(bins=16, low=0.0, high=15.0)
        head = YOLOHead(
            channels=backbone.channels,
            num_classes=num_classes,
            bins=distribution.bins,
            box_width=box_width,
            class_width=class_width,
        )
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            head=head,
            references=CellGrid(),
            assigner=assigner or TaskAlignedAssigner(),
            coder=coder or DistanceCoder(normalize=True),
            classification_loss=classification_loss or BCELoss(),
            box_loss=box_loss or CIoULoss(),
            distribution_loss=distribution,
            loss_weights=loss_weights or {"classification": 0.5, "box": 7.5, "distribution": 1.5},
            nms=nms or BatchedNMS(threshold=0.7),
            per_image=False,
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )

    @torch.no_grad()
    def diagnostics(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``positives_p3`` and so on count the positive cells of each level in the batch; ``positive_quality`` is the mean
        of what they shall score, 0 without any, which rises as predictions meet their objects.
        """
        assignment = self.assign(outputs, targets)
        counts = self.positives_per_level(assignment, outputs.lattice)
        if assignment.quality is None:
            return counts
        return counts | {"positive_quality": assignment.quality.sum() / max(len(assignment.rows), 1)}


def _prediction(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.constant_(layer.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]  # it has a bias
    return layer
