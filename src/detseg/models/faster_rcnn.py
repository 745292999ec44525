"""`"Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks" <https://arxiv.org/abs/1506.01497>`_.

Ren, He, Girshick and Sun, 2015, on a feature pyramid (Lin et al. 2017, `arXiv:1612.03144
<https://arxiv.org/abs/1612.03144>`_) with RoIAlign, as torchvision builds it. Differs from the paper: a pyramid instead
of VGG-16's last map, RoIAlign instead of RoI pooling, and both stages trained together (the paper's "approximate joint
training", section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detseg.models.box_branch import BoxBranch
from detseg.models.rpn import RegionProposalNetwork
from detseg.models.torchvision_weights import ClassLayer, load_torchvision
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone

BOX_RENAMES = {r"^roi_heads\.box_(head|predictor)\.": r"box.\1."}
"""Names of torchvision's box head, and ours."""

BOX_LAYERS = (
    ClassLayer("box.predictor.cls_score", background=True),
    ClassLayer("box.predictor.bbox_pred", background=True, width=4),
)
"""Layers with one output per class."""


class FasterRCNN(TwoStageDetector):
    """Region proposals, then class and box of each.

    Args:
        num_classes: K foreground classes.
        backbone: gives the pyramid.
        rpn: makes the first stage from ``channels``; its numbers are arguments of ``RegionProposalNetwork``.
        box: makes the second stage from ``num_classes`` and ``channels``; its numbers are arguments of ``BoxBranch``.
        weights: torchvision's name of published weights (``COCO_V1``; downloads), a state dict's path, or ``None``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        rpn: Callable[..., RegionProposalNetwork] = RegionProposalNetwork,
        box: Callable[..., BoxBranch] = BoxBranch,
        weights: str | Path | None = None,
    ) -> None:
        channels = backbone.channels[0]
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            rpn=rpn(channels=channels),
            box=box(num_classes=num_classes, channels=channels),
        )
        if weights is not None:
            load_torchvision(self, weights, builder="fasterrcnn_resnet50_fpn", layers=BOX_LAYERS, renames=BOX_RENAMES)
