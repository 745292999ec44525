"""Losses: a pure function each, and thin classes that are constructor arguments of the models."""

from detseg.losses.focal import FocalLoss, focal_loss
from detseg.losses.iou import CIoULoss, DIoULoss, GIoULoss, IoULoss
from detseg.losses.segmentation import SegmentationLoss, cross_entropy, dice_loss, dice_scores
from detseg.losses.separation import separation_weights
from detseg.losses.smooth_l1 import SmoothL1
from detseg.losses.softmax import SoftmaxLoss, softmax_loss

__all__ = [
    "CIoULoss",
    "DIoULoss",
    "FocalLoss",
    "GIoULoss",
    "IoULoss",
    "SegmentationLoss",
    "SmoothL1",
    "SoftmaxLoss",
    "cross_entropy",
    "dice_loss",
    "dice_scores",
    "focal_loss",
    "separation_weights",
    "softmax_loss",
]
