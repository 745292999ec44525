"""`"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_, He, Gkioxari, Dollár and Girshick, 2017.

Faster R-CNN on a feature pyramid with RoIAlign and a third branch that draws a mask inside every box, as torchvision
builds it. Differs from the paper: anchors, sampling and schedule are torchvision's where the two disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detseg.models.box_branch import BoxBranch
from detseg.models.faster_rcnn import BOX_LAYERS, BOX_RENAMES
from detseg.models.mask_branch import MaskBranch
from detseg.models.rpn import RegionProposalNetwork
from detseg.models.torchvision_weights import ClassLayer, Renames, load_torchvision
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone

MASK_RENAMES: Renames = {
    **BOX_RENAMES,
    r"^roi_heads\.mask_head\.mask_fcn(\d)\.": lambda match: f"mask.head.{int(match[1]) - 1}.0.",
    r"^roi_heads\.mask_(head|predictor)\.": r"mask.\1.",
}
"""Names of torchvision's heads (the first is how its published file still spells the mask head), and ours."""

MASK_LAYERS = (*BOX_LAYERS, ClassLayer("mask.predictor.mask_fcn_logits"))
"""Layers with one output per class."""


class MaskRCNN(TwoStageDetector):
    """Region proposals, then class, box and mask of each.

    Args:
        num_classes: K foreground classes.
        backbone: gives the pyramid.
        rpn: makes the first stage from ``channels``; its numbers are arguments of ``RegionProposalNetwork``.
        box: makes the box branch from ``num_classes`` and ``channels``; its numbers are arguments of ``BoxBranch``.
        mask: makes the mask branch likewise; its numbers are arguments of ``MaskBranch``.
        weights: torchvision's name of published weights (``COCO_V1``; downloads), a state dict's path, or ``None``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        rpn: Callable[..., RegionProposalNetwork] = RegionProposalNetwork,
        box: Callable[..., BoxBranch] = BoxBranch,
        mask: Callable[..., MaskBranch] = MaskBranch,
        weights: str | Path | None = None,
    ) -> None:
        channels = backbone.channels[0]
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            rpn=rpn(channels=channels),
            box=box(num_classes=num_classes, channels=channels),
            mask=mask(num_classes=num_classes, channels=channels),
        )
        if weights is not None:
            load_torchvision(self, weights, builder="maskrcnn_resnet50_fpn", layers=MASK_LAYERS, renames=MASK_RENAMES)
