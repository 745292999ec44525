"""A mask for every object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from detseg.metrics import CocoAP, MaskQuality
from detseg.structures import Detections, Target
from detseg.tasks.base import per_class, scalars
from detseg.tasks.two_stage import TwoStageDetection


class InstanceSegmentation(TwoStageDetection):
    """Boxes with masks: also logs COCO AP of masks, and how well masks fit where the box was found.

    Logged beside the boxes' figures (and the proposals', where the model has any): ``mask_map``, ``mask_map_50``, ...,
    ``mask_map/<class>``, and ``mask_quality``, the mean mask IoU of detections whose box matches an object.
    """

    needs_proposals: ClassVar[bool] = False

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of boxes, proposals and masks."""
        masks = CocoAP(iou_type="segm", class_names=self.class_names)
        return {**super().configure_metrics(), "mask": masks, "quality": MaskQuality()}

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[Detections], truths: list[Target], **context: Any
    ) -> None:
        """Count the boxes, proposals and masks of one batch."""
        super().update_metrics(metrics, predictions, truths, **context)
        metrics["mask"].update(predictions, truths)
        metrics["quality"].update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the figures of boxes, proposals and masks."""
        mask = values["mask"]
        return {
            **super().name_figures(values),
            **scalars(mask, "mask_"),
            **per_class(mask["map_per_class"], self.class_names, "mask_map"),
            **scalars(values["quality"]),
        }
