"""FCOS: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, 2019, arXiv:1904.01355.

Built in its later form (FCOS: A Simple and Strong Anchor-Free Object Detector, 2020, arXiv:2006.09214): centre
sampling, GIoU loss, centreness beside the box and not the class, scores sqrt(class * centreness). As in torchvision,
whose weights load and whose predictions and losses are equal: distances are a ReLU times the stride, where the paper
has the exponential of a learnt scale per level, and the box loss is not weighted by centreness. Differs from
torchvision in cost alone, see ``targets/points.py`` and ``losses/focal.py``, and in that crowd regions teach nothing.

Letters: B images, N points of one image, K classes, P positive points of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.box_loss import BoxLoss, Coder
from detseg.losses.distribution import DistributionFocalLoss
from detseg.losses.focal import FocalLoss
from detseg.losses.iou import GIoULoss
from detseg.losses.quality import ClassificationLoss
from detseg.models.dense import AnyAssigner, Assignment, DenseDetector, DenseOutputs, flat_boxes
from detseg.models.dense_heads import conv_tower, flatten_level, initialise_head, one_width
from detseg.models.torchvision_weights import ClassLayer, load_torchvision
from detseg.nn.backbone import Backbone
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator
from detseg.targets.crowds import learnable
from detseg.targets.points import DistanceCoder, PointAssigner, centreness


class ClassificationHead(nn.Module):
    """A tower, then one logit per class."""

    def __init__(self, *, channels: int, num_classes: int, depth: int, groups: int | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = conv_tower(channels, depth, groups=groups, nested=False)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        initialise_head(self, self.cls_logits)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits ``(B, N, K)`` of all levels ``(B, C, H, W)``."""
        return torch.cat([flatten_level(self.cls_logits(self.conv(level)), self.num_classes) for level in levels], 1)


class RegressionHead(nn.Module):
    """A tower, then four distances and the centreness; centreness beside the box is the better place (2020).

    With ``bins`` above 1 each distance is a distribution: that many logits.
    """

    def __init__(self, *, channels: int, depth: int, groups: int | None, bins: int = 1) -> None:
        super().__init__()
        self.width = 4 * bins
        self.conv = conv_tower(channels, depth, groups=groups, nested=False)
        self.bbox_reg = nn.Conv2d(channels, self.width, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        initialise_head(self)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return distances ``(B, N, 4)`` in strides, >= 0, and centreness logits ``(B, N)`` of all levels.

        With bins the first are their logits, ``(B, N, 4 * bins)``.
        """
        distances, centre = [], []
        for level in levels:
            hidden = self.conv(level)  # (B, C, H, W)
            raw = flatten_level(self.bbox_reg(hidden), self.width)  # (B, H * W, 4 * bins)
            distances.append(F.relu(raw) if self.width == 4 else raw)
            centre.append(self.bbox_ctrness(hidden).flatten(1))  # (B, H * W)
        return torch.cat(distances, 1), torch.cat(centre, 1)


class FCOSHead(nn.Module):
    """Both heads; they share no weights (figure 2).

    Args:
        channels: of every level.
        num_classes: K.
        depth: convolutions before each prediction.
        groups: of the group norm in the towers, or ``None`` for none.
        bins: values per distance, of which a distribution is predicted; 1 predicts the distance itself.
    """

    def __init__(self, *, channels: int, num_classes: int, depth: int, groups: int | None, bins: int = 1) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(
            channels=channels, num_classes=num_classes, depth=depth, groups=groups
        )
        self.regression_head = RegressionHead(channels=channels, depth=depth, groups=groups, bins=bins)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``(B, N, K)``, distances ``(B, N, 4 * bins)`` and centreness ``(B, N)``."""
        return self.classification_head(levels), *self.regression_head(levels)


class FCOS(DenseDetector):
    """The one-stage detector without anchors.

    Args:
        num_classes: foreground classes.
        backbone: pyramid levels of one width, in the paper P3 to P7 with 256 channels.
        head_depth: convolutions before each prediction.
        head_groups: of the group norm in the head; ``None`` is without.
        assigner: of points to boxes; ``None`` gives centre sampling with a radius of 1.5 strides and the paper's
            ranges of distances.
        coder: of boxes; ``None`` gives distances in strides.
        classification_loss: ``None`` gives focal loss with alpha 0.25 and gamma 2.
        box_loss: of boxes in pixels, or of the distances; ``None`` gives GIoU of the boxes.
        distribution_loss: where given, every distance is predicted as a distribution over its values (GFL).
        loss_weights: factors of the terms ``classification``, ``box``, ``centerness`` and ``distribution``; 1 where
            missing.
        nms: ``None`` gives NMS per class at IoU 0.6.
        score_threshold: detections must score higher, in [0, 1); torchvision's default of 0.2 costs recall.
        top_k: how many candidates per level go to NMS.
        max_detections: how many detections per image stay.
        weights: torchvision's name of published weights, such as ``COCO_V1``, or the path of a state dict.
    """

    term_names = ("classification", "box", "centerness", "distribution")

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        head_depth: int = 4,
        head_groups: int | None = 32,
        assigner: AnyAssigner | None = None,
        coder: Coder | None = None,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        distribution_loss: DistributionFocalLoss | None = None,
        loss_weights: Mapping[str, float] | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        top_k: int = 1000,
        max_detections: int = 100,
        weights: str | Path | None = None,
    ) -> None:
        head = FCOSHead(
            channels=one_width(backbone),
            num_classes=num_classes,
            depth=head_depth,
            groups=head_groups,
            bins=1 if distribution_loss is None else distribution_loss.bins,
        )
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            head=head,
            references=AnchorGenerator(sizes=[[stride] for stride in backbone.strides], ratios=[[1.0]]),
            assigner=assigner or PointAssigner(radius=1.5),
            coder=coder or DistanceCoder(normalize=True),
            classification_loss=classification_loss or FocalLoss(),
            box_loss=box_loss or GIoULoss(),
            distribution_loss=distribution_loss,
            loss_weights=loss_weights,
            nms=nms or BatchedNMS(threshold=0.6),
            per_image=False,
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        if weights is not None:
            layer = ClassLayer("head.classification_head.cls_logits")
            load_torchvision(self, weights, builder="fcos_resnet50_fpn", layers=[layer])

    def box_terms(self, outputs: DenseOutputs, assignment: Assignment) -> dict[str, Tensor]:
        """Return ``loss_centerness`` of the positive points beside the terms of all dense detectors."""
        assert outputs.quality is not None  # an FCOSHead always gives it
        logits = outputs.quality.flatten()[assignment.rows].float()  # (P,)
        wanted = centreness(self.coder.encode(assignment.boxes, assignment.references))  # (P,)
        centre = F.binary_cross_entropy_with_logits(logits, wanted, assignment.weights, reduction="sum")
        return super().box_terms(outputs, assignment) | {"loss_centerness": centre}

    @torch.no_grad()
    def diagnostics(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``positives_p3`` and so on count the positive points of each level in the batch; ``ambiguous_points`` is the
        share of positive points that more than one box claims on their level (2019, section 3.2), 0 without any; other
        assigners than the paper's have no such claims.
        """
        assignment = self.assign(outputs, targets)
        counts = self.positives_per_level(assignment, outputs.lattice)
        if not isinstance(self.assigner, PointAssigner):
            return counts
        objects = flat_boxes([learnable(target) for target in targets], outputs.lattice)  # (G, 4), (G,)
        claims = self.assigner.claims(*objects, outputs.lattice)[1]  # (C,)
        count = torch.unique(claims, return_counts=True)[1]  # (points,)
        share = (count > 1).sum() / max(len(count), 1)
        return counts | {"ambiguous_points": share}
