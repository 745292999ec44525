"""Losses: a pure function each, and thin classes that are constructor arguments of the models."""

from detseg.losses.segmentation import SegmentationLoss, cross_entropy, dice_loss, dice_scores
from detseg.losses.separation import separation_weights

__all__ = ["SegmentationLoss", "cross_entropy", "dice_loss", "dice_scores", "separation_weights"]
