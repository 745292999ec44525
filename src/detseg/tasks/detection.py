"""Boxes and their classes, by whatever detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from detseg.metrics import CocoAP
from detseg.structures import Detections, Target
from detseg.tasks.base import Task, per_class, scalars


class Detection(Task):
    """Detection with COCO AP: the whole of one-stage and anchor-free detectors.

    Logged beside the loss terms: ``map``, ``map_50``, ..., ``map/<class>``, and what the model's own ``diagnostics``
    gives: with anchors the positives per level and the easy negatives' share of the loss, without anchors the positives
    per level and the share of points that lie in more than one object.
    """

    def configure_metrics(self) -> dict[str, Metric]:
        """Return COCO AP of boxes."""
        return {"box": CocoAP(iou_type="bbox", class_names=self.class_names)}

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[Detections], truths: list[Target], **context: Any
    ) -> None:
        """Count the boxes of one batch."""
        metrics["box"].update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the twelve COCO figures, and AP per class."""
        box = values["box"]
        return {**scalars(box), **per_class(box["map_per_class"], self.class_names, "map")}
