"""Training, validation and testing of a model: one class per kind of truth and of figures that only it has.

One-stage and anchor-free detectors ended up with equal bodies (what only they have comes from the model's own
``diagnostics``), so both names stand for ``Detection``.
"""

from detseg.tasks.base import Task
from detseg.tasks.detection import Detection
from detseg.tasks.instance import InstanceSegmentation
from detseg.tasks.semantic import SemanticSegmentation
from detseg.tasks.two_stage import TwoStageDetection

OneStageDetection = Detection
AnchorFreeDetection = Detection

__all__ = [
    "AnchorFreeDetection",
    "Detection",
    "InstanceSegmentation",
    "OneStageDetection",
    "SemanticSegmentation",
    "Task",
    "TwoStageDetection",
]
