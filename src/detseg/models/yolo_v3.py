"""YOLOv3: Redmon & Farhadi, YOLOv3: An Incremental Improvement, 2018, arXiv:1804.02767.

Built: three scales of Darknet-53, joined from coarse to fine by concatenation, with three priors each; the prior of
the best shape learns an object, priors that overlap one by 0.5 or more learn nothing (section 2.1), the rest are
background; objectness and every class are logistic regressions (section 2.2).

Differs: the loss is divided by the objects of the batch, and the objectness starts at 0.01, so that training from
random weights is calm. A prior's overlap counts where it stands (the text), not where its box is predicted to be (the
code).

Letters: B images, N priors of one image, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from detseg.losses.box_loss import BoxLoss
from detseg.losses.grid_box import GridBoxLoss, LogisticLoss, PositiveLoss
from detseg.models.dense import Assignment, DenseOutputs
from detseg.models.dense_heads import PRIOR
from detseg.models.prior_detector import PriorDetector
from detseg.nn.backbone import Backbone
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.matchers import BETWEEN
from detseg.targets.priors import GridCoder, PriorAssigner, PriorGrid


class YOLOv3(PriorDetector):
    """The detector with priors on three scales.

    Args:
        num_classes: K foreground classes.
        backbone: the scales, finest first, such as ``BackboneWithConcat``.
        anchors: sizes of the priors of each scale.
        assigner: of objects to priors; ``None`` ignores others from an IoU of 0.5.
        box_weight: factor of the box loss.
        class_weight: factor of the classification loss.
        objectness_weight: factor of the objectness loss.
        coder: of boxes; ``None`` gives sigmoid offsets.
        classification_loss: of the positive priors; ``None`` gives K logistic regressions.
        box_loss: ``None`` gives the paper's gradient, truth minus prediction.
        nms: ``None`` gives NMS per class at IoU 0.45.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per scale go to NMS.
        max_detections: how many detections per image stay.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        anchors: PriorGrid,
        assigner: PriorAssigner | None = None,
        box_weight: float = 1.0,
        class_weight: float = 1.0,
        objectness_weight: float = 1.0,
        coder: GridCoder | None = None,
        classification_loss: PositiveLoss | None = None,
        box_loss: BoxLoss | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        top_k: int = 1000,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            anchors=anchors,
            hidden=True,
            objectness=math.log(PRIOR / (1 - PRIOR)),
            assigner=assigner or PriorAssigner(ignore=0.5),
            coder=coder or GridCoder(),
            classification_loss=classification_loss or LogisticLoss(),
            box_loss=box_loss or GridBoxLoss(offset="cross_entropy"),
            box_weight=box_weight,
            class_weight=class_weight,
            nms=nms or BatchedNMS(threshold=0.45),
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        self.objectness_weight = objectness_weight

    def objectness_term(self, outputs: DenseOutputs, assignment: Assignment, targets: list[Target]) -> Tensor:
        """Return the cross entropy of the objectness of all priors but the ignored ones."""
        assert outputs.quality is not None  # a PriorHead always gives it
        wanted = (assignment.matched >= 0).float()  # (B, N)
        weights = assignment.scale[:, None] * (assignment.matched != BETWEEN)  # (B, N)
        loss = F.binary_cross_entropy_with_logits(outputs.quality.float(), wanted, reduction="none")  # (B, N)
        return self.objectness_weight * (loss * weights).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoids ``(C, K)``: classes do not exclude each other."""
        return torch.sigmoid(logits)
