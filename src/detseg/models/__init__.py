"""The models, one paper and one file each. Names load when they are first used; ``available()`` lists the YAMLs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detseg.lazy import lazy_names
from detseg.models.catalogue import ModelCard, available

if TYPE_CHECKING:
    from detseg.models.autoencoder import Autoencoder
    from detseg.models.cascade_rcnn import CascadeRCNN
    from detseg.models.centernet import CenterNet
    from detseg.models.contract import Detector, Segmenter
    from detseg.models.cornernet import CornerNet
    from detseg.models.deconvnet import DeconvNet
    from detseg.models.deeplabv3 import DeepLabV3
    from detseg.models.dilated import DilatedNet
    from detseg.models.fast_rcnn import FastRCNN
    from detseg.models.faster_rcnn import FasterRCNN
    from detseg.models.fcn import FCN
    from detseg.models.fcos import FCOS
    from detseg.models.localiser import Localiser
    from detseg.models.mask_rcnn import MaskRCNN
    from detseg.models.rcnn import RCNN
    from detseg.models.retinanet import RetinaNet
    from detseg.models.same_size import SameSize
    from detseg.models.segnet import SegNet
    from detseg.models.sliding_window import SlidingWindow
    from detseg.models.smp import SMP
    from detseg.models.spp_net import SPPNet
    from detseg.models.ssd import SSD
    from detseg.models.ssdlite import SSDLite
    from detseg.models.unet import BackboneUNet, UNet
    from detseg.models.yolo import YOLO
    from detseg.models.yolo_v1 import YOLOv1
    from detseg.models.yolo_v2 import YOLOv2
    from detseg.models.yolo_v3 import YOLOv3

_HOMES = {
    "BackboneUNet": "unet",
    "CascadeRCNN": "cascade_rcnn",
    "CenterNet": "centernet",
    "CornerNet": "cornernet",
    "DeepLabV3": "deeplabv3",
    "Detector": "contract",
    "FCN": "fcn",
    "FCOS": "fcos",
    "FastRCNN": "fast_rcnn",
    "FasterRCNN": "faster_rcnn",
    "Localiser": "localiser",
    "MaskRCNN": "mask_rcnn",
    "RCNN": "rcnn",
    "RetinaNet": "retinanet",
    "SPPNet": "spp_net",
    "SSD": "ssd",
    "SSDLite": "ssdlite",
    "Segmenter": "contract",
    "UNet": "unet",
    "SegNet": "segnet",
    "DeconvNet": "deconvnet",
    "SlidingWindow": "sliding_window",
    "SameSize": "same_size",
    "Autoencoder": "autoencoder",
    "DilatedNet": "dilated",
    "SMP": "smp",
    "YOLOv1": "yolo_v1",
    "YOLOv2": "yolo_v2",
    "YOLOv3": "yolo_v3",
    "YOLO": "yolo",
}
"""Public name -> file in this folder."""

__all__ = [
    "FCN",
    "FCOS",
    "RCNN",
    "SMP",
    "SSD",
    "YOLO",
    "Autoencoder",
    "BackboneUNet",
    "CascadeRCNN",
    "CenterNet",
    "CornerNet",
    "DeconvNet",
    "DeepLabV3",
    "Detector",
    "DilatedNet",
    "FastRCNN",
    "FasterRCNN",
    "Localiser",
    "MaskRCNN",
    "ModelCard",
    "RetinaNet",
    "SPPNet",
    "SSDLite",
    "SameSize",
    "SegNet",
    "Segmenter",
    "SlidingWindow",
    "UNet",
    "YOLOv1",
    "YOLOv2",
    "YOLOv3",
    "available",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
