"""Detectors that classify proposals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor
from torchmetrics import Metric

from detseg.metrics import ProposalRecall
from detseg.models.svm_branch import SVMBranch
from detseg.structures import Detections, Target
from detseg.tasks.base import restore, scalars
from detseg.tasks.detection import Detection


class TwoStageDetection(Detection):
    """Detection from proposals: also logs how many objects the proposals cover, before any classification.

    Logged beside what ``Detection`` logs: ``proposal_ar_100``, likewise 300, 1000 and 2000 (average recall over IoU 0.5
    to 0.95 of the best proposals), ``proposal_recall_50_100`` and so on (recall at IoU 0.5 alone, which bounds
    ``map_50`` where proposals are moved little), and from the model's ``diagnostics`` the share of foreground among the
    sampled proposals.

    Raises:
        TypeError: the model has no ``proposals``.
    """

    needs_proposals: ClassVar[bool] = True

    def on_train_start(self) -> None:
        """Take up the run; SVMs that were fitted to the features as they were score nothing while those learn on."""
        super().on_train_start()
        branch = getattr(self.model, "box", None)
        if isinstance(branch, SVMBranch):
            branch.forget()

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of boxes and of proposals."""
        metrics = super().configure_metrics()
        if hasattr(self.model, "proposals"):
            metrics["proposal"] = ProposalRecall(limits=(100, 300, 1000, 2000))
        elif self.needs_proposals:
            raise TypeError(f"{type(self.model).__name__} has no proposals; choose task=one_stage for it")
        return metrics

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[Detections], truths: list[Target], **context: Any
    ) -> None:
        """Count the boxes and proposals of one batch."""
        super().update_metrics(metrics, predictions, truths, **context)
        if "proposal" in metrics:
            batch = context["batch"]
            proposals = cast(Any, self.model).proposals(context["outputs"], batch.sizes)
            metrics["proposal"].update(restore(proposals, batch), truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the figures of boxes and of proposals."""
        return {**super().name_figures(values), **scalars(values.get("proposal", {}), "proposal_")}
