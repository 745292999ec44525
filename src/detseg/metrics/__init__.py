"""Metrics: all are ``torchmetrics.Metric``, exact, and the same on any number of processes.

Update in the step, compute at the end of the epoch. A figure that rests on no object is NaN, and a count of 0 says why.
"""

from __future__ import annotations

from detseg.metrics.boundary import BoundaryQuality
from detseg.metrics.coco_ap import CocoAP
from detseg.metrics.confusion import BoxConfusion
from detseg.metrics.mask_quality import MaskQuality
from detseg.metrics.mean_iou import MeanIoU
from detseg.metrics.proposal_recall import ProposalRecall
from detseg.metrics.table import table_rows
from detseg.metrics.voc_ap import VocAP

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
