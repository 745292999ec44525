"""Losses: a pure function each, and thin classes that are constructor arguments of the models."""

from detseg.losses.boundary import BoundaryLoss, boundary_loss, signed_distances
from detseg.losses.distribution import DistributionFocalLoss, distribution_focal_loss, expectation
from detseg.losses.focal import FocalLoss, focal_loss
from detseg.losses.grid_box import ClassSoftmaxLoss, GridBoxLoss, LogisticLoss, PositiveLoss
from detseg.losses.grouping import GroupingLoss, pull_loss, push_loss
from detseg.losses.hard_pixels import FocalMapLoss, HardPixelLoss, focal_cross_entropy, hard_pixels
from detseg.losses.heatmap import HeatmapFocalLoss, heatmap_focal_loss
from detseg.losses.iou import CIoULoss, DIoULoss, GIoULoss, IoULoss
from detseg.losses.map_loss import MapLoss, SumOfLosses
from detseg.losses.overlap import DiceLoss, JaccardLoss, LovaszLoss, TverskyLoss, lovasz_softmax, tversky_scores
from detseg.losses.quality import (
    BCELoss,
    QualityFocalLoss,
    VarifocalLoss,
    bce_loss,
    quality_focal_loss,
    varifocal_loss,
)
from detseg.losses.segmentation import SegmentationLoss, cross_entropy, dice_loss, dice_scores
from detseg.losses.separation import connected_regions, separation_weights
from detseg.losses.smooth_l1 import SmoothL1
from detseg.losses.softmax import SoftmaxLoss, softmax_loss
from detseg.losses.squared import SquaredError

__all__ = [
    "BCELoss",
    "BoundaryLoss",
    "CIoULoss",
    "ClassSoftmaxLoss",
    "DIoULoss",
    "DiceLoss",
    "DistributionFocalLoss",
    "FocalLoss",
    "FocalMapLoss",
    "GIoULoss",
    "GridBoxLoss",
    "GroupingLoss",
    "HardPixelLoss",
    "HeatmapFocalLoss",
    "IoULoss",
    "JaccardLoss",
    "LogisticLoss",
    "LovaszLoss",
    "MapLoss",
    "PositiveLoss",
    "QualityFocalLoss",
    "SegmentationLoss",
    "SmoothL1",
    "SoftmaxLoss",
    "SquaredError",
    "SumOfLosses",
    "TverskyLoss",
    "VarifocalLoss",
    "bce_loss",
    "boundary_loss",
    "connected_regions",
    "cross_entropy",
    "dice_loss",
    "dice_scores",
    "distribution_focal_loss",
    "expectation",
    "focal_cross_entropy",
    "focal_loss",
    "hard_pixels",
    "heatmap_focal_loss",
    "lovasz_softmax",
    "pull_loss",
    "push_loss",
    "quality_focal_loss",
    "separation_weights",
    "signed_distances",
    "softmax_loss",
    "tversky_scores",
    "varifocal_loss",
]
