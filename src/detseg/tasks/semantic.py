"""A class for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from detseg.metrics import BoundaryQuality, MeanIoU
from detseg.models.inference import Inference, ask_by
from detseg.structures import SemanticMap, Target
from detseg.tasks.base import Task, per_class, scalars


class SemanticSegmentation(Task):
    """Logs ``miou`` and its relatives from one confusion matrix, ``iou/<class>`` and ``dice/<class>``.

    Args:
        boundary: also ``boundary_iou`` and ``boundary_f``, over all classes and per class: how well borders are drawn.
        inference: how validation and test ask the model; ``None`` leaves that as it is, one pass over the image.
        **common: arguments of ``Task``.
    """

    def __init__(self, *, boundary: bool = False, inference: Inference | None = None, **common: Any) -> None:
        self.boundary = boundary
        super().__init__(**common)
        if inference is not None:
            ask_by(self.model, inference)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return mean IoU over the whole split, and the quality of borders where it is asked for."""
        pixel = MeanIoU(num_classes=len(self.class_names), class_names=self.class_names)
        return {"pixel": pixel} | ({"border": BoundaryQuality(class_names=self.class_names)} if self.boundary else {})

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[SemanticMap], truths: list[Target], **context: Any
    ) -> None:
        """Count the pixels of one batch."""
        for metric in metrics.values():
            metric.update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the figures over all classes, and each kind per class, such as ``iou/<class>``."""
        named: dict[str, float] = {}
        for metric, kinds in {"pixel": ("iou", "dice"), "border": ("boundary_iou", "boundary_f")}.items():
            if metric in values:
                named |= scalars(values[metric])
                for kind in kinds:
                    named |= per_class(values[metric][f"{kind}_per_class"], self.class_names, kind)
        return named
