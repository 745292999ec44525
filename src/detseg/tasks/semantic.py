"""A class for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from detseg.metrics import MeanIoU
from detseg.structures import SemanticMap, Target
from detseg.tasks.base import Task, per_class, scalars


class SemanticSegmentation(Task):
    """Semantic segmentation: logs ``miou`` and its relatives from one confusion matrix, and ``iou/<class>``."""

    def configure_metrics(self) -> dict[str, Metric]:
        """Return mean IoU over the whole split."""
        return {"pixel": MeanIoU(num_classes=len(self.class_names), class_names=self.class_names)}

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[SemanticMap], truths: list[Target], **context: Any
    ) -> None:
        """Count the pixels of one batch."""
        metrics["pixel"].update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the figures over all classes, and IoU per class."""
        pixel = values["pixel"]
        return {**scalars(pixel), **per_class(pixel["iou_per_class"], self.class_names, "iou")}
