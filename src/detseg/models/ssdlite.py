"""SSDlite: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, arXiv:1801.04381, section 6.2.

Built: SSD whose further levels and predictors are separable convolutions, in its later form with MobileNetV3-Large
(Howard et al., Searching for MobileNetV3, 2019, arXiv:1905.02244, section 6.3). As in torchvision, whose
``ssdlite320_mobilenet_v3_large`` loads and whose outputs, losses and predictions are equal. Differs from the papers, as
torchvision does: every level has six default boxes per cell, spread evenly, at scales from 0.2 to 0.95.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from detseg.losses.box_loss import BoxLoss, Coder
from detseg.models.dense import Assigner
from detseg.models.ssd import SSD, Published
from detseg.nn.backbone import Backbone
from detseg.nn.mobile import conv_norm, draw_normal
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.targets.default_boxes import DefaultBoxes
from detseg.targets.samplers import HardNegativeMining


def separable_predictor(norm_momentum: float) -> Callable[[int, int], nn.Module]:
    """Return what makes a predictor: a depthwise 3x3 convolution, a batch norm, ReLU6, then a 1x1 convolution.

    Args:
        norm_momentum: share of a batch in the running statistics of the batch norm.
    """

    def build(channels: int, width: int) -> nn.Module:
        depthwise = conv_norm(channels, channels, size=3, depthwise=True, momentum=norm_momentum)
        predictor = nn.Sequential(depthwise, nn.Conv2d(channels, width, 1))
        draw_normal(predictor)
        return predictor

    return build


class SSDLite(SSD):
    """SSD of separable convolutions.

    Args:
        num_classes: foreground classes.
        backbone: the levels, in the papers those of ``BackboneWithExtras`` of kind ``separable`` on a mobile network.
        default_boxes: of every level; ``None`` gives torchvision's, for six levels and images of 320 pixels.
        norm_momentum: share of a batch in the running statistics of the predictors' batch norms.
        assigner: see ``SSD``.
        coder: see ``SSD``.
        classification_loss: see ``SSD``.
        mining: see ``SSD``.
        box_loss: see ``SSD``.
        box_weight: see ``SSD``.
        nms: ``None`` gives NMS per class at IoU 0.55.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per class go to NMS.
        max_detections: how many detections per image stay.
        weights: torchvision's name of published weights, such as ``COCO_V1``, or the path of a state dict; they were
            trained with a reduced tail, and bring the mean and standard deviation of their images.

    Raises:
        ValueError: the default boxes are for another number of levels, or a factor is negative.
    """

    published = Published(
        builder="ssdlite320_mobilenet_v3_large",
        renames={r"^backbone\.features\.": "backbone.body.features."},
        layer=".1",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        default_boxes: DefaultBoxes | None = None,
        norm_momentum: float = 0.03,
        assigner: Assigner | None = None,
        coder: Coder | None = None,
        classification_loss: nn.Module | None = None,
        mining: HardNegativeMining | None = None,
        box_loss: BoxLoss | None = None,
        box_weight: float = 1.0,
        nms: Suppression | None = None,
        score_threshold: float = 0.001,
        top_k: int = 300,
        max_detections: int = 300,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            default_boxes=default_boxes or ssdlite320_boxes(),
            predictor=separable_predictor(norm_momentum),
            assigner=assigner,
            coder=coder,
            classification_loss=classification_loss,
            mining=mining,
            box_loss=box_loss,
            box_weight=box_weight,
            nms=nms or BatchedNMS(threshold=0.55),
            score_threshold=score_threshold,
            top_k=top_k,
            max_detections=max_detections,
            weights=weights,
        )


def ssdlite320_boxes() -> DefaultBoxes:
    """Return torchvision's default boxes: 3234 at 320 pixels, scales by the paper's equation 4 from 0.2 to 0.95."""
    scales = [0.2 + 0.75 * level / 5 for level in range(6)]
    return DefaultBoxes(image_size=320, scales=[*scales, 1.0], ratios=[[2, 3]] * 6)
