"""SSD: Liu et al., SSD: Single Shot MultiBox Detector, 2016, arXiv:1512.02325.

Built: figure 2. Every level of a backbone has convolutions of its own that give, for each default box, logits of
background and the classes, and a box; hard-negative mining, smooth L1, NMS per class. SSD300 and SSD512 differ in
levels and default boxes alone, thus in their configs. As in torchvision, whose ``ssd300_vgg16`` loads and whose
outputs, losses and predictions are equal: fc6 and fc7 of VGG-16 are convolutions, boxes are coded with the variances
0.1 and 0.2 of the authors' release. Differs from torchvision: images are not resized here (the data does that), and
crowd regions teach nothing.

Letters: B images, N default boxes of one image, A per cell, K classes, P positives and C candidates of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import BoxLoss, Coder
from detseg.losses.smooth_l1 import SmoothL1
from detseg.losses.softmax import SoftmaxLoss
from detseg.models.dense import (
    Assigner,
    Assignment,
    DenseDetector,
    DenseOutputs,
    best_per_group,
)
from detseg.models.dense_heads import flatten_level
from detseg.models.torchvision_weights import ClassLayer, Renames, load_torchvision
from detseg.nn import Normalize
from detseg.nn.backbone import Backbone
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.coders import BoxCoder
from detseg.targets.default_boxes import DefaultBoxes, MultiBoxMatcher
from detseg.targets.samplers import HardNegativeMining

VGG_RENAMES: Renames = {
    r"^backbone\.features\.": "backbone.body.",
    r"^backbone\.scale_weight$": "backbone.norm.weight",
    r"^backbone\.extra\.0\.7\.": "backbone.body.fc.",
    r"^backbone\.extra\.0\.(\d+)\.": lambda found: f"backbone.body.{int(found[1]) + 23}.",  # from pool4 on
    r"^backbone\.extra\.(\d+)\.": lambda found: f"backbone.extra.{int(found[1]) - 1}.",
}
"""Names of torchvision's SSD that differ from ours, in this order."""


@dataclass(frozen=True)
class Published:
    """How torchvision's weights of one form fit.

    Attributes:
        builder: torchvision's function whose weights they are.
        renames: names that differ.
        layer: of the convolution in each predictor that has outputs per class, ``""`` where it is the predictor itself.
        mean: with which the images were normalised, RGB in [0, 1].
        std: likewise.
    """

    builder: str
    renames: Renames
    layer: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


SSD300 = Published(
    builder="ssd300_vgg16",
    renames=VGG_RENAMES,
    layer="",
    mean=(0.48235, 0.45882, 0.40784),
    std=(1 / 255, 1 / 255, 1 / 255),
)


def convolution_predictor(channels: int, width: int) -> nn.Module:
    """Return SSD's predictor: one 3x3 convolution (section 2.1)."""
    convolution = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has a bias
    return convolution


class LevelPredictors(nn.Module):
    """One predictor per level, as levels share neither width nor number of default boxes.

    Args:
        predictors: of each level, ``(B, C, H, W)`` to ``(B, A * width, H, W)``.
        width: numbers per default box.
    """

    def __init__(self, predictors: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.width = width
        self.module_list = nn.ModuleList(predictors)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return ``(B, N, width)`` of all levels."""
        pairs = zip(self.module_list, levels, strict=True)
        return torch.cat([flatten_level(predict(level), self.width) for predict, level in pairs], dim=1)


class SSDHead(nn.Module):
    """Classes and boxes of every level.

    Args:
        channels: of each level.
        anchors: A of each level.
        num_classes: K; there is one more output, background, before them.
        predictor: makes a predictor from the channels that come in and go out.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        anchors: Sequence[int],
        num_classes: int,
        predictor: Callable[[int, int], nn.Module] = convolution_predictor,
    ) -> None:
        super().__init__()
        pairs = list(zip(channels, anchors, strict=True))
        scored = num_classes + 1
        self.classification_head = LevelPredictors([predictor(width, count * scored) for width, count in pairs], scored)
        self.regression_head = LevelPredictors([predictor(width, count * 4) for width, count in pairs], 4)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """Return logits ``(B, N, K + 1)``, box deltas ``(B, N, 4)`` and no quality."""
        return self.classification_head(levels), self.regression_head(levels), None


class SSD(DenseDetector):
    """The detector with default boxes on levels of their own width.

    Args:
        num_classes: foreground classes.
        backbone: the levels, in the paper those of ``BackboneWithExtras`` on VGG-16.
        default_boxes: of every level; ``None`` gives SSD300's, for six levels and images of 300 pixels.
        predictor: makes the predictor of a level; ``None`` gives the paper's 3x3 convolution.
        assigner: of default boxes to objects; ``None`` gives the best of each object and those of IoU 0.5 or more.
        coder: of boxes; ``None`` gives R-CNN's with the weights 10, 10, 5, 5.
        classification_loss: of logits ``(B, N, K + 1)`` and labels ``(B, N)``, a number for each ``(B, N)``; ``None``
            gives the softmax loss.
        mining: which background teaches beside the positives; ``None`` gives three per positive, the hardest.
        box_loss: of the deltas; ``None`` gives smooth L1 that turns linear at 1.
        box_weight: factor of the box loss, alpha of equation 1.
        nms: ``None`` gives NMS per class at IoU 0.45.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per class go to NMS.
        max_detections: how many detections per image stay.
        weights: torchvision's name of published weights, such as ``COCO_V1``, or the path of a state dict; they bring
            the mean and standard deviation of images that they were trained with.

    Raises:
        ValueError: the default boxes are for another number of levels, or a factor is negative.
    """

    published = SSD300

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        default_boxes: DefaultBoxes | None = None,
        predictor: Callable[[int, int], nn.Module] | None = None,
        assigner: Assigner | None = None,
        coder: Coder | None = None,
        classification_loss: nn.Module | None = None,
        mining: HardNegativeMining | None = None,
        box_loss: BoxLoss | None = None,
        box_weight: float = 1.0,
        nms: Suppression | None = None,
        score_threshold: float = 0.01,
        top_k: int = 400,
        max_detections: int = 200,
        weights: str | Path | None = None,
    ) -> None:
        default_boxes = default_boxes or ssd300_boxes()
        if box_weight < 0:
            raise ValueError(f"{type(self).__name__}: box_weight is {box_weight}; it must not be negative")
        head = SSDHead(
            channels=backbone.channels,
            anchors=self._anchors_per_level(default_boxes, backbone),
            num_classes=num_classes,
            predictor=predictor or convolution_predictor,
        )
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            head=head,
            references=default_boxes,
            assigner=assigner or MultiBoxMatcher(threshold=0.5),
            coder=coder or BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
            classification_loss=classification_loss or SoftmaxLoss(),
            box_loss=box_loss or SmoothL1(beta=1.0),
            nms=nms or BatchedNMS(threshold=0.45),
            per_image=False,
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        self.mining = mining or HardNegativeMining(ratio=3.0)
        self.box_weight = box_weight
        if weights is not None:
            self._load_published(weights, default_boxes.num_anchors())

    @classmethod
    def _anchors_per_level(cls, default_boxes: DefaultBoxes, backbone: Backbone) -> list[int]:
        counts = default_boxes.num_anchors()
        if len(counts) != len(backbone.channels):
            raise ValueError(
                f"{cls.__name__}: default_boxes are given for {len(counts)} levels, but the backbone has "
                f"{len(backbone.channels)}, of {backbone.channels} channels; give one list of ratios per level, and "
                "one scale more"
            )
        return counts

    def _load_published(self, weights: str | Path, anchors: Sequence[int]) -> None:
        published = self.published
        names = [f"head.classification_head.module_list.{level}{published.layer}" for level in range(len(anchors))]
        layers = [ClassLayer(name, background=True, anchors=count) for name, count in zip(names, anchors, strict=True)]
        load_torchvision(self, weights, builder=published.builder, layers=layers, renames=published.renames)
        self.normalize = Normalize(published.mean, published.std)

    def classification_term(self, outputs: DenseOutputs, assignment: Assignment) -> Tensor:
        """Return the loss of the positives and of the background that is mined, over the number of positives."""
        losses = self._losses(outputs, assignment)  # (B, N)
        taught = self.mining(losses, assignment.matched) | (assignment.matched >= 0)  # (B, N)
        return (losses.masked_fill(~taught, 0.0).sum(dim=1) * assignment.scale).sum()

    def _losses(self, outputs: DenseOutputs, assignment: Assignment) -> Tensor:
        losses: Tensor = self.classification_loss(outputs.logits, assignment.labels.view(assignment.matched.shape))
        return losses  # (B, N)

    def box_terms(self, outputs: DenseOutputs, assignment: Assignment) -> dict[str, Tensor]:
        """Return ``loss_box`` of the positives (equation 2)."""
        return {name: self.box_weight * term for name, term in super().box_terms(outputs, assignment).items()}

    def candidates(self, outputs: DenseOutputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image, default box, label and score ``(C,)`` of the ``top_k`` best above the threshold of every class.

        The images stand in order, and in each of them the classes.
        """
        probability = outputs.logits.float().softmax(dim=2)[..., 1:].transpose(1, 2)  # (B, K, N)
        image, label, reference = (probability > self.score_threshold).nonzero().unbind(1)  # (C,) each
        score = probability[image, label, reference]  # (C,)
        group = image * self.num_classes + label  # (C,)
        keep = best_per_group(score, group, self.top_k, threshold=self.score_threshold)
        return image[keep], reference[keep], label[keep], score[keep]

    @torch.no_grad()
    def diagnostics(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``positives_level_1`` and so on count the positive default boxes of each level in the batch, finest first;
        ``mined_share`` is the share of the classification loss that comes from mined background.
        """
        assignment = self.assign(outputs, targets)
        counts = torch.split((assignment.matched >= 0).sum(0), outputs.lattice.counts)  # L x (N_l,)
        found = {f"positives_level_{level}": count.sum().float() for level, count in enumerate(counts, start=1)}
        losses = self._losses(outputs, assignment)  # (B, N)
        mined = losses[self.mining(losses, assignment.matched)].sum()
        total = mined + losses[assignment.matched >= 0].sum()
        return found | {"mined_share": mined / total.clamp(min=torch.finfo(losses.dtype).tiny)}


def ssd300_boxes() -> DefaultBoxes:
    """Return the default boxes of SSD300 for COCO: 8732 at 300 pixels (section 3.4)."""
    return DefaultBoxes(
        image_size=300,
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        ratios=[[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        steps=[8, 16, 32, 64, None, None],
    )
