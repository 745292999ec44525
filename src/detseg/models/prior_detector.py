"""What YOLOv2 and YOLOv3 share: priors on a grid, of which one learns each object, an objectness, and a class.

Redmon & Farhadi 2017, arXiv:1612.08242, and 2018, arXiv:1804.02767. It is the composition of ``models/dense.py`` with
another reading of its outputs: ``quality`` is the objectness, classes and boxes learn where a prior has an object
alone, and the score is objectness times class.

Letters: B images, N priors of one image, A priors per cell, K classes, P positive priors of all images, C candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import BoxLoss, is_of_boxes
from detseg.losses.grid_box import GridBoxLoss, PositiveLoss
from detseg.models.dense import (
    Assignment,
    DenseDetector,
    DenseOutputs,
    best_per_group,
)
from detseg.models.dense_heads import check_levels, flatten_level
from detseg.nn.backbone import Backbone
from detseg.nn.darknet import dark_convolution
from detseg.ops.nms import Suppression
from detseg.structures import Target
from detseg.targets.lattice import Lattice
from detseg.targets.matchers import BETWEEN
from detseg.targets.priors import GridCoder, PriorAssigner, PriorGrid, prior_strides


class PriorHead(nn.Module):
    """Predictions of every level by convolutions of its own.

    Args:
        channels: of each level.
        anchors: A, per cell.
        num_classes: K.
        hidden: a 3x3 convolution to twice the channels first, as in YOLOv3; else the predictions alone.
        objectness: logit that the objectness starts at.
    """

    def __init__(
        self, *, channels: Sequence[int], anchors: int, num_classes: int, hidden: bool, objectness: float
    ) -> None:
        super().__init__()
        self.numbers = 5 + num_classes
        self.hidden = nn.ModuleList(dark_convolution(c, 2 * c) if hidden else nn.Identity() for c in channels)
        widths = [2 * c if hidden else c for c in channels]
        self.predictions = nn.ModuleList(nn.Conv2d(width, anchors * self.numbers, 1) for width in widths)
        for level in self.predictions:
            assert isinstance(level, nn.Conv2d) and level.bias is not None
            nn.init.normal_(level.weight, std=0.01)
            nn.init.zeros_(level.bias)
            nn.init.constant_(level.bias.data.view(anchors, -1)[:, 4], objectness)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits ``(B, N, K)``, t ``(B, N, 4)`` and objectness logits ``(B, N)``."""
        parts = zip(levels, self.hidden, self.predictions, strict=True)
        flat = torch.cat([flatten_level(last(first(level)), self.numbers) for level, first, last in parts], 1)
        return flat[..., 5:], flat[..., :4], flat[..., 4]  # in the order of the papers: x, y, w, h, object, classes


class PriorDetector(DenseDetector):
    """The composition; a paper's file adds its objectness and says how classes exclude each other.

    Args:
        num_classes: K foreground classes.
        backbone: one or more levels.
        anchors: sizes of the priors per level.
        hidden: see ``PriorHead``.
        objectness: logit that the objectness starts at.
        assigner: of objects to priors.
        coder: of boxes.
        classification_loss: of the positive priors.
        box_loss: of their t and of the offsets wanted, or of boxes.
        box_weight: factor of the box loss.
        class_weight: factor of the classification loss.
        nms: of the detections of one image.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per level go to NMS.
        max_detections: how many detections per image stay.

    Raises:
        ValueError: ``box_loss`` is neither ``GridBoxLoss`` nor one of boxes.
    """

    coder: GridCoder  # type: ignore[assignment]  # asks for the stride too: what calls it is overridden here

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        anchors: PriorGrid,
        hidden: bool,
        objectness: float,
        assigner: PriorAssigner,
        coder: GridCoder,
        classification_loss: PositiveLoss,
        box_loss: BoxLoss,
        box_weight: float,
        class_weight: float,
        nms: Suppression,
        score_threshold: float,
        top_k: int,
        max_detections: int,
    ) -> None:
        if not (is_of_boxes(box_loss) or isinstance(box_loss, GridBoxLoss)):
            raise ValueError(
                f"{type(self).__name__}: {type(box_loss).__name__} does not know that offsets lie behind a sigmoid; "
                "take GridBoxLoss, or a loss of boxes such as GIoULoss"
            )
        head = PriorHead(
            channels=backbone.channels,
            anchors=check_levels(anchors, backbone, anchors.num_anchors()),
            num_classes=num_classes,
            hidden=hidden,
            objectness=objectness,
        )
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            head=head,
            references=anchors,
            assigner=assigner,
            coder=coder,  # type: ignore[arg-type]  # likewise
            classification_loss=classification_loss,
            box_loss=box_loss,
            nms=nms,
            per_image=False,
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        self.box_weight = box_weight
        self.class_weight = class_weight

    def loss(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return ``loss_objectness``, ``loss_classification`` and ``loss_box`` per object; see ``Detector.loss``."""
        assignment = self.assign(outputs, targets)
        logits = outputs.logits.flatten(0, 1)[assignment.rows].float()  # (P, K)
        labels = assignment.labels[assignment.rows]  # (P,)
        classes = self.classification_loss(logits, labels, assignment.weights)
        terms = {
            "loss_objectness": self.objectness_term(outputs, assignment, targets),
            "loss_classification": self.class_weight * classes,
        }
        return terms | self.box_terms(outputs, assignment)

    @abstractmethod
    def objectness_term(self, outputs: DenseOutputs, assignment: Assignment, targets: list[Target]) -> Tensor:
        """Return the loss of the objectness of all priors, a scalar."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities ``(C, K)`` of the classes, given an object, from their logits."""

    def box_terms(self, outputs: DenseOutputs, assignment: Assignment) -> dict[str, Tensor]:
        """Return ``loss_box`` of the positive priors."""
        numbers = outputs.regression.flatten(0, 1)[assignment.rows].float()  # (P, 4)
        stride = prior_strides(outputs.lattice)[assignment.rows % assignment.matched.shape[1]]  # (P, 2)
        if is_of_boxes(self.box_loss):
            numbers = self.coder.decode(numbers, assignment.references, stride)  # (P, 4)
            wanted = assignment.boxes  # (P, 4)
        else:
            wanted = self.coder.offsets(assignment.boxes, assignment.references, stride)  # (P, 4)
        return {"loss_box": self.box_weight * self.box_loss(numbers, wanted, assignment.weights)}

    def decode(self, regression: Tensor, reference: Tensor, lattice: Lattice) -> Tensor:
        """Return boxes ``(C, 4)`` xyxy pixels; the coder asks for the size of a cell too."""
        return self.coder.decode(regression, lattice.boxes[reference], prior_strides(lattice)[reference])

    def candidates(self, outputs: DenseOutputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image, prior, label and score of the ``top_k`` best above the threshold on every level.

        No score exceeds its objectness, so that of few priors the classes are looked at.
        """
        assert outputs.quality is not None  # a PriorHead always gives it
        objectness = outputs.quality.float().sigmoid()  # (B, N)
        image, reference = (objectness > self.score_threshold).nonzero().unbind(1)  # (R,) each
        classes = self.probabilities(outputs.logits[image, reference].float())  # (R, K)
        scores = objectness[image, reference, None] * classes  # (R, K)
        row, label = (scores > self.score_threshold).nonzero().unbind(1)  # (C,) each
        image, reference, score = image[row], reference[row], scores[row, label]  # (C,) each
        ends = torch.tensor(outputs.lattice.counts, device=score.device).cumsum(0)  # (L,)
        group = image * len(ends) + torch.bucketize(reference, ends, right=True)  # (C,)
        keep = best_per_group(score, group, self.top_k, threshold=self.score_threshold)
        return image[keep], reference[keep], label[keep], score[keep]

    @torch.no_grad()
    def diagnostics(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``positives_p3`` and so on count the objects that each level learns; ``ignored_priors`` is the share of priors
        that are neither positive nor background.
        """
        assignment = self.assign(outputs, targets)
        ignored = (assignment.matched == BETWEEN).float().mean()
        return self.positives_per_level(assignment, outputs.lattice) | {"ignored_priors": ignored}
