"""YOLOv2: Redmon & Farhadi, YOLO9000: Better, Faster, Stronger, 2017, arXiv:1612.08242, section 2.

Built: priors from k-means (``detseg anchors``), batch norm everywhere, a passthrough from the finer map, centres bound
to their cells, objectness that learns the IoU of its box, a softmax over classes. Training at changing sizes belongs to
the data; the network takes any size. Not built: the hierarchy of words by which YOLO9000 joins data sets.

The paper names no loss. Here it is YOLO's sum of squares (equation 3 there) with the factors of the released code: a
prior whose box covers an object by more than 0.6 is no background. It is divided by the objects of the batch. Differs
from that code: no warm-up in which all boxes are drawn to their priors.

Letters: B images, N priors of one image, K classes, P positive priors of all images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detseg.losses.box_loss import BoxLoss
from detseg.losses.grid_box import ClassSoftmaxLoss, GridBoxLoss, PositiveLoss
from detseg.models.dense import Assignment, DenseOutputs, flat_boxes
from detseg.models.prior_detector import PriorDetector
from detseg.nn.backbone import Backbone
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Target
from detseg.targets.crowds import learnable
from detseg.targets.matchers import BETWEEN
from detseg.targets.priors import GridCoder, PriorAssigner, PriorGrid, covering, prior_strides
from detseg.targets.sparse import paired_iou


class YOLOv2(PriorDetector):
    """The detector with priors on one map.

    Args:
        num_classes: K foreground classes.
        backbone: one level, such as ``BackboneWithPassthrough``.
        anchors: sizes of the priors.
        ignore: IoU of a predicted box with any object above which its prior is no background.
        object_weight: factor of the objectness of priors with an object.
        empty_weight: factor of the objectness of the others.
        box_weight: factor of the box loss.
        class_weight: factor of the classification loss.
        coder: of boxes; ``None`` gives sigmoid offsets.
        classification_loss: of the positive priors; ``None`` gives a softmax.
        box_loss: ``None`` gives squared differences.
        nms: ``None`` gives NMS per class at IoU 0.45.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates go to NMS.
        max_detections: how many detections per image stay.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        anchors: PriorGrid,
        ignore: float = 0.6,
        object_weight: float = 5.0,
        empty_weight: float = 1.0,
        box_weight: float = 1.0,
        class_weight: float = 1.0,
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
            hidden=False,
            objectness=0.0,  # squares behind a sigmoid have no slope at small probabilities
            assigner=PriorAssigner(ignore=None),
            coder=coder or GridCoder(),
            classification_loss=classification_loss or ClassSoftmaxLoss(),
            box_loss=box_loss or GridBoxLoss(offset="squared"),
            box_weight=box_weight,
            class_weight=class_weight,
            nms=nms or BatchedNMS(threshold=0.45),
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
        )
        self.ignore = ignore
        self.object_weight = object_weight
        self.empty_weight = empty_weight

    def objectness_term(self, outputs: DenseOutputs, assignment: Assignment, targets: list[Target]) -> Tensor:
        """Return the squared differences of objectness and IoU with the object, or zero where there is none."""
        assert outputs.quality is not None  # a PriorHead always gives it
        wanted, weights = self._objectness(outputs, assignment, targets)
        found = outputs.quality.float().sigmoid()  # (B, N)
        return (weights * assignment.scale[:, None] * (found - wanted).square()).sum()

    @torch.no_grad()
    def _objectness(
        self, outputs: DenseOutputs, assignment: Assignment, targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        """Return the objectness wanted of every prior ``(B, N)`` and its weight ``(B, N)``."""
        lattice = outputs.lattice
        regression = outputs.regression.detach().float()  # (B, N, 4)
        boxes = self.coder.decode(regression, lattice.boxes, prior_strides(lattice))  # (B, N, 4)
        objects, image = flat_boxes([learnable(target) for target in targets], lattice)  # (G, 4), (G,)
        covered = covering(boxes, objects, image, lattice, self.ignore)  # (B, N)
        silent = covered | (assignment.matched == BETWEEN)  # (B, N)
        weights = torch.full_like(boxes[..., 0], self.empty_weight).masked_fill(silent, 0.0).flatten()  # (B * N,)
        wanted = torch.zeros_like(weights)  # (B * N,)
        wanted[assignment.rows] = paired_iou(boxes.flatten(0, 1)[assignment.rows], assignment.boxes)
        weights[assignment.rows] = self.object_weight
        return wanted.view(covered.shape), weights.view(covered.shape)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax ``(C, K)``: classes exclude each other."""
        return logits.softmax(dim=1)
