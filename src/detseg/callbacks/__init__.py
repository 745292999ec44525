"""What watches a run from outside: checkpoints, averages, pictures, speed, progress lines and loggers."""

from detseg.callbacks.ema import EMA
from detseg.callbacks.images import ImageLogger
from detseg.callbacks.learning_rate import LearningRate
from detseg.callbacks.loggers import wandb_logger
from detseg.callbacks.progress import LineProgress, progress_bar
from detseg.callbacks.speed import SpeedMonitor
from detseg.callbacks.stamp import CheckpointStamp

__all__ = [
    "EMA",
    "CheckpointStamp",
    "ImageLogger",
    "LearningRate",
    "LineProgress",
    "SpeedMonitor",
    "progress_bar",
    "wandb_logger",
]
