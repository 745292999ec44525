"""Datasets and data modules. The names load on first use, so that ``import detseg.data`` is cheap."""

from __future__ import annotations

from detseg.lazy import lazy_names

_HOMES = {
    "Coco": "coco",
    "DataError": "check",
    "DetectionData": "module",
    "DetectionEval": "transforms",
    "DetectionTrain": "transforms",
    "MaskFolder": "masks",
    "Orchard": "orchard",
    "Report": "check",
    "Sample": "sample",
    "SampleDataset": "sample",
    "SemanticEval": "transforms",
    "SemanticTrain": "transforms",
    "Voc": "voc",
    "Yolo": "yolo",
    "collate": "sample",
    "read_image": "image",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
