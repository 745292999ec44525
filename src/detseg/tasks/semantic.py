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
    """Logs ``miou`` and its relatives from one confusion matrix, ``iou/<class>`` and ``dice/<class>``."""

    def configure_metrics(self) -> dict[str, Metric]:
        """Return mean IoU over the whole split."""
        return {"pixel": MeanIoU(num_classes=len(self.class_names), class_names=self.class_names)}

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[SemanticMap], truths: list[Target], **context: Any
    ) -> None:
        """Count the pixels of one batch."""
        metrics["pixel"].update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the figures over all classes, and IoU and Dice per class."""
        pixel = values["pixel"]
        classes = {kind: per_class(pixel[f"{kind}_per_class"], self.class_names, kind) for kind in ("iou", "dice")}
        return {**scalars(pixel), **classes["iou"], **classes["dice"]}
