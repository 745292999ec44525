"""What watches a run from outside: checkpoints, averages, pictures, speed, progress lines and loggers."""

from detseg.callbacks.checkpoint import Checkpoint
from detseg.callbacks.compile import Compile
from detseg.callbacks.curves import Curves
from detseg.callbacks.durable_io import DurableIO
from detseg.callbacks.ema import EMA
from detseg.callbacks.freeze import Freeze
from detseg.callbacks.guard import Guard
from detseg.callbacks.images import ImageLogger
from detseg.callbacks.loggers import CsvLog, EventLog
from detseg.callbacks.progress import LineProgress, progress_bar
from detseg.callbacks.shutdown import Shutdown
from detseg.callbacks.speed import SpeedMonitor
from detseg.callbacks.stamp import CheckpointStamp
from detseg.callbacks.trackers import MlflowLog, wandb_logger

__all__ = [
    "EMA",
    "Checkpoint",
    "CheckpointStamp",
    "Compile",
    "CsvLog",
    "Curves",
    "DurableIO",
    "EventLog",
    "Freeze",
    "Guard",
    "ImageLogger",
    "LineProgress",
    "MlflowLog",
    "Shutdown",
    "SpeedMonitor",
    "progress_bar",
    "wandb_logger",
]
