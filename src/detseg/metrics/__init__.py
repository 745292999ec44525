"""Metrics: all are ``torchmetrics.Metric``, exact, and the same on any number of processes.

Update in the step, compute at the end of the epoch. A figure that rests on no object is NaN, and a count of 0 says why.
The names load when they are first used: what prints figures needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detseg.lazy import lazy_names

if TYPE_CHECKING:
    from detseg.metrics.boundary import BoundaryQuality
    from detseg.metrics.coco_ap import CocoAP
    from detseg.metrics.confusion import BoxConfusion
    from detseg.metrics.mask_quality import MaskQuality
    from detseg.metrics.mean_iou import MeanIoU
    from detseg.metrics.proposal_recall import ProposalRecall
    from detseg.metrics.table import table_rows
    from detseg.metrics.voc_ap import VocAP

_HOMES = {
    "BoundaryQuality": "boundary",
    "BoxConfusion": "confusion",
    "CocoAP": "coco_ap",
    "MaskQuality": "mask_quality",
    "MeanIoU": "mean_iou",
    "ProposalRecall": "proposal_recall",
    "VocAP": "voc_ap",
    "table_rows": "table",
}

__all__ = [
    "BoundaryQuality",
    "BoxConfusion",
    "CocoAP",
    "MaskQuality",
    "MeanIoU",
    "ProposalRecall",
    "VocAP",
    "table_rows",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
