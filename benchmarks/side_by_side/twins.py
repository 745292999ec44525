"""torchvision's detectors and ours of the same form, with the same weights: for the timing of both.

Weights are random, as no benchmark downloads any; ResNet-50 has frozen batch norm, of which the last three stages
train. torchvision's models do not resize, for sizes belong to the data here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection, resnet50
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detseg.models import FCOS, SSD, FasterRCNN, MaskRCNN, RetinaNet, SSDLite
from detseg.models.faster_rcnn import BOX_LAYERS, BOX_RENAMES
from detseg.models.mask_rcnn import MASK_LAYERS, MASK_RENAMES
from detseg.models.torchvision_weights import ClassLayer, load_torchvision_state
from detseg.nn import AtrousVGG16, BackboneWithExtras, BackboneWithFPN, MobileNetV3, TorchvisionBackbone
from detseg.nn.normalize import Normalize

IDS = 91  # of COCO as torchvision counts them
DENSE = ("ssdlite", "ssd300", "retinanet", "fcos")
KNOWN = ("faster_rcnn", "mask_rcnn", *DENSE)
SIDES = {"ssd300": 300, "ssdlite": 320}
"""Pixels of the square images that a model is made for; the others take any."""


Prepare = Callable[[nn.Module], object]


def twins(name: str, prepare: Prepare = lambda model: None) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's model and ours with its weights; the seed is the caller's.

    Args:
        name: of ``KNOWN``.
        prepare: may change torchvision's weights before ours takes them over.
    """
    return _ssd_twins(name, prepare) if name in SIDES else _pyramid_twins(name, prepare)


def _leave_sizes(theirs: Any) -> None:
    """Take away the resizing; torchvision's own ``_skip_resize`` does so in training alone."""
    theirs.transform.resize = lambda image, target: (image, target)


def _their_backbone(dense: bool) -> nn.Module:
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for name, module in body.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.2)  # or the residual sums of random weights grow without bound
    extra: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if dense else {}
    return _resnet_fpn_extractor(body, 3, **extra)


def _our_backbone(dense: bool) -> BackboneWithFPN:
    strides = (8, 16, 32) if dense else (4, 8, 16, 32)
    body = TorchvisionBackbone(name="resnet50", strides=strides, frozen_norm=True, frozen_stages=2)
    return BackboneWithFPN(backbone=body, extra="p6p7_from_p5" if dense else "pool")


def _pyramid_twins(name: str, prepare: Prepare) -> tuple[nn.Module, nn.Module]:
    dense = name in DENSE
    makers: dict[str, Callable[..., nn.Module]] = {
        "faster_rcnn": detection.FasterRCNN,
        "mask_rcnn": detection.MaskRCNN,
        "retinanet": partial(detection.RetinaNet, anchor_generator=_default_anchorgen(), detections_per_img=100),
        "fcos": partial(detection.FCOS, score_thresh=0.05),
    }
    theirs = makers[name](_their_backbone(dense), num_classes=IDS)
    _leave_sizes(theirs)
    prepare(theirs)
    ours_makers: dict[str, Callable[..., nn.Module]] = {
        "faster_rcnn": FasterRCNN,
        "mask_rcnn": MaskRCNN,
        "retinanet": RetinaNet,
        "fcos": FCOS,
    }
    ours = ours_makers[name](num_classes=IDS - 1, backbone=_our_backbone(dense))
    layers: dict[str, Sequence[ClassLayer]] = {
        "faster_rcnn": BOX_LAYERS,
        "mask_rcnn": MASK_LAYERS,
        "retinanet": [ClassLayer("head.classification_head.cls_logits", anchors=9)],
        "fcos": [ClassLayer("head.classification_head.cls_logits")],
    }
    renames = {"faster_rcnn": BOX_RENAMES, "mask_rcnn": MASK_RENAMES}.get(name)
    load_torchvision_state(ours, theirs.state_dict(), layers=layers[name], renames=renames)
    return theirs, ours


def _ssd_twins(name: str, prepare: Prepare) -> tuple[nn.Module, nn.Module]:
    plain = name == "ssd300"
    make = detection.ssd300_vgg16 if plain else detection.ssdlite320_mobilenet_v3_large
    theirs = make(weights=None, weights_backbone=None, num_classes=IDS)
    _leave_sizes(theirs)
    prepare(theirs)
    third = [256, 3, 1, 0] if plain else [256, 3, 2, 1]
    last = [256, 3, 1, 0] if plain else [128, 3, 2, 1]
    backbone = BackboneWithExtras(
        backbone=AtrousVGG16() if plain else MobileNetV3(reduced_tail=True),
        extra=[[512, 3, 2, 1], [256, 3, 2, 1], third, last],
        kind="plain" if plain else "separable",
        norm_momentum=0.03,
        l2_scale=20.0 if plain else None,
    )
    ours = (SSD if plain else SSDLite)(num_classes=IDS - 1, backbone=backbone)
    _load_ssd(ours, theirs.state_dict())
    return theirs, ours


def _load_ssd(ours: SSD, state: dict[str, Tensor]) -> None:
    published = ours.published
    layers = [
        ClassLayer(f"head.classification_head.module_list.{level}{published.layer}", background=True, anchors=count)
        for level, count in enumerate(ours.references.num_anchors())
    ]
    load_torchvision_state(ours, state, layers=layers, renames=published.renames)
    ours.normalize = Normalize(published.mean, published.std)
