"""RetinaNet: Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv:1708.02002.

Built: figure 3. Two towers of four 3x3 convolutions on every pyramid level, nine anchors per cell, focal loss on all
anchors. As in torchvision, whose weights load and whose predictions and losses are equal: P6 may come from P5,
boxes learn by plain L1 where the paper has smooth L1, the best anchors of every box learn it however low their IoU,
and every image is divided by its own number of positive anchors. Differs from torchvision in cost alone, see
``models/dense.py`` and ``losses/focal.py``, and in that crowd regions teach nothing.

Letters: B images, N anchors of one image, A anchors per cell, K classes, P positive anchors of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import BoxLoss, Coder
from detseg.losses.distribution import DistributionFocalLoss
from detseg.losses.focal import FocalLoss, negative_share
from detseg.losses.quality import ClassificationLoss
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.dense import AnyAssigner, DenseDetector, DenseOutputs
from detseg.models.dense_heads import check_levels, conv_tower, flatten_level, initialise_head, one_width
from detseg.models.torchvision_weights import ClassLayer, load_torchvision
from detseg.nn.backbone import Backbone
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator
from detseg.targets.coders import BoxCoder
from detseg.targets.matchers import BETWEEN
from detseg.targets.sparse import SparseIoUMatcher


class ClassificationHead(nn.Module):
    """A tower, then one logit per anchor and class."""

    def __init__(self, *, channels: int, anchors: int, num_classes: int, depth: int, groups: int | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = conv_tower(channels, depth, groups=groups, nested=True)
        self.cls_logits = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        initialise_head(self, self.cls_logits)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits ``(B, N, K)`` of all levels ``(B, C, H, W)``."""
        return torch.cat([flatten_level(self.cls_logits(self.conv(level)), self.num_classes) for level in levels], 1)


class RegressionHead(nn.Module):
    """A tower, then four box deltas per anchor, the same for every class, or ``bins`` logits for each of the four."""

    def __init__(self, *, channels: int, anchors: int, depth: int, groups: int | None, bins: int = 1) -> None:
        super().__init__()
        self.width = 4 * bins
        self.conv = conv_tower(channels, depth, groups=groups, nested=True)
        self.bbox_reg = nn.Conv2d(channels, anchors * self.width, 3, padding=1)
        initialise_head(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return deltas ``(B, N, 4 * bins)`` of all levels ``(B, C, H, W)``."""
        return torch.cat([flatten_level(self.bbox_reg(self.conv(level)), self.width) for level in levels], 1)


class RetinaNetHead(nn.Module):
    """Both heads; they share no weights (section 4.1).

    Args:
        channels: of every level.
        anchors: A, per cell.
        num_classes: K.
        depth: convolutions before each prediction.
        groups: of the group norm in the towers, or ``None`` for none.
        bins: values per delta, of which a distribution is predicted; 1 predicts the delta itself.
    """

    def __init__(
        self, *, channels: int, anchors: int, num_classes: int, depth: int, groups: int | None, bins: int = 1
    ) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(
            channels=channels, anchors=anchors, num_classes=num_classes, depth=depth, groups=groups
        )
        self.regression_head = RegressionHead(channels=channels, anchors=anchors, depth=depth, groups=groups, bins=bins)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """Return logits ``(B, N, K)``, deltas ``(B, N, 4 * bins)`` and no quality."""
        return self.classification_head(levels), self.regression_head(levels), None


class RetinaNet(DenseDetector):
    """The one-stage detector with anchors.

    Args:
        num_classes: foreground classes.
        backbone: pyramid levels of one width, in the paper P3 to P7 with 256 channels.
        anchors: of every level; ``None`` gives the paper's, 4, 5.04 and 6.35 strides at the ratios 1:2, 1:1, 2:1.
        head_depth: convolutions before each prediction.
        head_groups: of a group norm in the head, which the paper does not have; ``None`` is without.
        assigner: of anchors to boxes; ``None`` gives the paper's IoUs of 0.5 and 0.4.
        coder: of boxes; ``None`` gives R-CNN's without weights.
        classification_loss: ``None`` gives focal loss with alpha 0.25 and gamma 2.
        box_loss: of the deltas, or of the boxes that they decode to; ``None`` gives L1 of the deltas.
        distribution_loss: where given, every delta is predicted as a distribution over its values (GFL).
        loss_weights: factors of the terms ``classification``, ``box`` and ``distribution``; 1 where missing.
        nms: ``None`` gives NMS per class at IoU 0.5.
        per_image: divide by the positives of each image (torchvision), or by those of the batch (paper).
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per level go to NMS.
        max_detections: how many detections per image stay.
        weights: torchvision's name of published weights, such as ``COCO_V1``, or the path of a state dict.
    """

    classification_loss: ClassificationLoss

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        anchors: AnchorGenerator | None = None,
        head_depth: int = 4,
        head_groups: int | None = None,
        assigner: AnyAssigner | None = None,
        coder: Coder | None = None,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        distribution_loss: DistributionFocalLoss | None = None,
        loss_weights: Mapping[str, float] | None = None,
        nms: Suppression | None = None,
        per_image: bool = True,
        score_threshold: float = 0.05,
        top_k: int = 1000,
        max_detections: int = 100,
        weights: str | Path | None = None,
    ) -> None:
        anchors = anchors or paper_anchors(backbone.strides)
        head = RetinaNetHead(
            channels=one_width(backbone),
            anchors=check_levels(anchors, backbone, anchors.num_anchors()),
            num_classes=num_classes,
            depth=head_depth,
            groups=head_groups,
            bins=1 if distribution_loss is None else distribution_loss.bins,
        )
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            head=head,
            references=anchors,
            assigner=assigner or SparseIoUMatcher(positive=0.5, negative=0.4, allow_low_quality=True),
            coder=coder or BoxCoder(),
            classification_loss=classification_loss or FocalLoss(),
            box_loss=box_loss or SmoothL1(beta=0.0),
            distribution_loss=distribution_loss,
            loss_weights=loss_weights,
            nms=nms or BatchedNMS(threshold=0.5),
            per_image=per_image,
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        if weights is not None:
            layer = ClassLayer("head.classification_head.cls_logits", anchors=anchors.num_anchors()[0])
            builder = "retinanet_resnet50_fpn" if head_groups is None else "retinanet_resnet50_fpn_v2"
            load_torchvision(self, weights, builder=builder, layers=[layer])

    @torch.no_grad()
    def diagnostics(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``positives_p3`` and so on count the positive anchors of each level in the batch; ``easy_negative_share`` is
        the share of the classification loss from background entries with a probability below 0.1, which focal loss
        is there to hold down.
        """
        assignment = self.assign(outputs, targets)
        counted = (assignment.matched.flatten() != BETWEEN).nonzero()[:, 0]  # ignored anchors have no loss
        logits, labels = outputs.logits.flatten(0, 1)[counted].float(), assignment.labels[counted]  # (R, K), (R,)
        quality = self.quality(outputs, assignment)  # (B * N,) or None
        entries = self.classification_loss.entries(logits, labels, None if quality is None else quality[counted])
        share = negative_share(entries, logits, labels)
        return self.positives_per_level(assignment, outputs.lattice) | {"easy_negative_share": share}


def paper_anchors(strides: Sequence[int]) -> AnchorGenerator:
    """Return nine anchors per cell: 4 strides times 2^0, 2^(1/3), 2^(2/3) at ratios 1:2, 1:1, 2:1 (section 4)."""
    sizes = [[int(4 * stride * 2 ** (octave / 3)) for octave in range(3)] for stride in strides]
    return AnchorGenerator(sizes=sizes, ratios=[[0.5, 1.0, 2.0]])
