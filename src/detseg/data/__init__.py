"""Datasets and data modules. The names load on first use, so that ``import detseg.data`` is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"detseg.data has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"detseg.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
