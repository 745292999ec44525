"""The models, one paper and one file each. Names load when they are first used; ``available()`` lists the YAMLs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detseg.models.catalogue import ModelCard, available

if TYPE_CHECKING:
    from detseg.models.cascade_rcnn import CascadeRCNN
    from detseg.models.contract import Detector, Segmenter
    from detseg.models.fast_rcnn import FastRCNN
    from detseg.models.faster_rcnn import FasterRCNN
    from detseg.models.fcos import FCOS
    from detseg.models.mask_rcnn import MaskRCNN
    from detseg.models.rcnn import RCNN
    from detseg.models.retinanet import RetinaNet
    from detseg.models.spp_net import SPPNet
    from detseg.models.unet import BackboneUNet, UNet
    from detseg.models.yolo import YOLO

_HOMES = {
    "BackboneUNet": "unet",
    "CascadeRCNN": "cascade_rcnn",
    "Detector": "contract",
    "FCOS": "fcos",
    "FastRCNN": "fast_rcnn",
    "FasterRCNN": "faster_rcnn",
    "MaskRCNN": "mask_rcnn",
    "RCNN": "rcnn",
    "RetinaNet": "retinanet",
    "SPPNet": "spp_net",
    "Segmenter": "contract",
    "UNet": "unet",
    "YOLO": "yolo",
}
"""Public name -> file in this folder."""

__all__ = [
    "FCOS",
    "RCNN",
    "YOLO",
    "BackboneUNet",
    "CascadeRCNN",
    "Detector",
    "FastRCNN",
    "FasterRCNN",
    "MaskRCNN",
    "ModelCard",
    "RetinaNet",
    "SPPNet",
    "Segmenter",
    "UNet",
    "available",
]


def __getattr__(name: str) -> Any:
    """Import the file of a model when its name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"detseg.models has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
