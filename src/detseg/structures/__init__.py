"""What the rooms exchange: images in batches, truth, detections and maps. Each type checks itself."""

from detseg.structures.base import TensorFields
from detseg.structures.batch import Batch
from detseg.structures.detections import Detections
from detseg.structures.maps import IGNORE_INDEX, PanopticMap, SemanticMap
from detseg.structures.target import Target

__all__ = ["IGNORE_INDEX", "Batch", "Detections", "PanopticMap", "SemanticMap", "Target", "TensorFields"]
