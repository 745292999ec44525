"""Losses: a pure function each, and thin classes that are constructor arguments of the models."""

from detseg.losses.distribution import DistributionFocalLoss, distribution_focal_loss, expectation
from detseg.losses.focal import FocalLoss, focal_loss
from detseg.losses.grid_box import ClassSoftmaxLoss, GridBoxLoss, LogisticLoss, PositiveLoss
from detseg.losses.grouping import GroupingLoss, pull_loss, push_loss
from detseg.losses.heatmap import HeatmapFocalLoss, heatmap_focal_loss
from detseg.losses.iou import CIoULoss, DIoULoss, GIoULoss, IoULoss
from detseg.losses.quality import (
    BCELoss,
    QualityFocalLoss,
    VarifocalLoss,
    bce_loss,
    quality_focal_loss,
    varifocal_loss,
)
from detseg.losses.segmentation import SegmentationLoss, cross_entropy, dice_loss, dice_scores
from detseg.losses.separation import separation_weights
from detseg.losses.smooth_l1 import SmoothL1
from detseg.losses.softmax import SoftmaxLoss, softmax_loss
from detseg.losses.squared import SquaredError

__all__ = [
    "BCELoss",
    "CIoULoss",
    "ClassSoftmaxLoss",
    "DIoULoss",
    "DistributionFocalLoss",
    "FocalLoss",
    "GIoULoss",
    "GridBoxLoss",
    "GroupingLoss",
    "HeatmapFocalLoss",
    "IoULoss",
    "LogisticLoss",
    "PositiveLoss",
    "QualityFocalLoss",
    "SegmentationLoss",
    "SmoothL1",
    "SoftmaxLoss",
    "SquaredError",
    "VarifocalLoss",
    "bce_loss",
    "cross_entropy",
    "dice_loss",
    "dice_scores",
    "distribution_focal_loss",
    "expectation",
    "focal_loss",
    "heatmap_focal_loss",
    "pull_loss",
    "push_loss",
    "quality_focal_loss",
    "separation_weights",
    "softmax_loss",
    "varifocal_loss",
]
