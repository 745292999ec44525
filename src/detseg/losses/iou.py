"""Box losses from the overlap: they see a box as a whole, not four numbers.

Built: IoU (Yu et al. 2016, UnitBox, arXiv:1608.01471, as -log IoU), GIoU (Rezatofighi et al. 2019, arXiv:1902.09630),
DIoU and CIoU (Zheng et al. 2020, arXiv:1911.08287); all but the first are torchvision's, summed. A detector reads
from ``of_boxes`` that it must decode its predictions first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detseg.losses.normalise import weighted_sum

LEAST_SIDE = 1e-3  # pixels


def iou_loss(boxes: Tensor, targets: Tensor, weights: Tensor | None = None, *, eps: float = 1e-7) -> Tensor:
    """Return the summed -log IoU, a scalar.

    Args:
        boxes: ``(P, 4)`` predicted, xyxy.
        targets: ``(P, 4)`` true, xyxy.
        weights: ``(P,)`` of each pair; ``None`` weighs all by 1.
        eps: IoUs below count as this, so that the loss of a pair without overlap is finite (its gradient is 0).
    """
    boxes = boxes.float()
    side = (torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])).clamp(min=0)
    inter = side.prod(1)  # (P,)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1)  # (P,)
    return weighted_sum(-(inter / (areas - inter).clamp(min=eps)).clamp(min=eps).log(), weights)


def giou_loss(boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the summed 1 - GIoU of pairs of boxes ``(P, 4)`` xyxy, weighted by ``weights`` (P,), a scalar."""
    return weighted_sum(generalized_box_iou_loss(boxes, targets), weights)


def diou_loss(boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the summed 1 - DIoU of pairs of boxes ``(P, 4)`` xyxy, weighted by ``weights`` (P,), a scalar."""
    return weighted_sum(distance_box_iou_loss(boxes, targets), weights)


def ciou_loss(boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the summed 1 - CIoU of pairs of boxes ``(P, 4)`` xyxy, weighted by ``weights`` (P,), a scalar.

    Predicted boxes count as a thousandth of a pixel wide and high at least: without sides they have no aspect ratio,
    and distances that pass a ReLU start so.
    """
    corner, end = boxes[:, :2], boxes[:, 2:]  # (P, 2) each
    sided = torch.cat((corner, torch.maximum(end, corner + LEAST_SIDE)), dim=1)  # (P, 4)
    return weighted_sum(complete_box_iou_loss(sided, targets), weights)


class IoULoss(nn.Module):
    """-log IoU, FCOS's first choice (2019, equation 2)."""

    of_boxes: ClassVar[bool] = True

    def forward(self, boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum over pairs of boxes ``(P, 4)``; see ``iou_loss``."""
        return iou_loss(boxes, targets, weights)


class GIoULoss(nn.Module):
    """1 - GIoU, which also pulls boxes together that do not overlap; FCOS's choice since 2020."""

    of_boxes: ClassVar[bool] = True

    def forward(self, boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum over pairs of boxes ``(P, 4)``; see ``giou_loss``."""
        return giou_loss(boxes, targets, weights)


class DIoULoss(nn.Module):
    """1 - IoU + the distance of the centres over the diagonal of both."""

    of_boxes: ClassVar[bool] = True

    def forward(self, boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum over pairs of boxes ``(P, 4)``; see ``diou_loss``."""
        return diou_loss(boxes, targets, weights)


class CIoULoss(nn.Module):
    """DIoU + a term for the aspect ratio."""

    of_boxes: ClassVar[bool] = True

    def forward(self, boxes: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum over pairs of boxes ``(P, 4)``; see ``ciou_loss``."""
        return ciou_loss(boxes, targets, weights)
