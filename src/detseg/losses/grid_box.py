"""Losses of what a cell predicts about its object, in YOLOv2 and YOLOv3: offsets, sides and the class.

YOLO9000, 2017, arXiv:1612.08242, section 2; YOLOv3, 2018, arXiv:1804.02767, section 2.1 and 2.2. The sides learn by the
squared difference of logs. The offsets learn by the squared difference behind the sigmoid (YOLOv2), or so that the
gradient before the sigmoid is truth minus prediction, as the text of YOLOv3 has it, thus by cross entropy. Classes
learn by a softmax (YOLOv2) or a logistic regression each (YOLOv3, section 2.2).

Letters: P positive priors of all images, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.normalise import weighted_sum
from detseg.losses.quality import bce_loss


class PositiveLoss(Protocol):
    """A loss of the classes of positive priors, such as the last two below."""

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over rows of ``(P, K)`` with labels ``(P,)`` in 0..K-1 and weights ``(P,)``, a scalar."""
        ...


class GridBoxLoss(nn.Module):
    """The summed loss of (t_x, t_y, t_w, t_h).

    Args:
        offset: ``squared`` differences of the sigmoids, or their ``cross_entropy``.

    Raises:
        ValueError: ``offset`` is another word.
    """

    of_boxes: ClassVar[bool] = False

    def __init__(self, *, offset: Literal["squared", "cross_entropy"]) -> None:
        super().__init__()
        if offset not in ("squared", "cross_entropy"):
            raise ValueError(f"GridBoxLoss: offset is {offset!r}; it must be 'squared' or 'cross_entropy'")
        self.offset = offset

    def forward(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum, a scalar; 0 for empty input.

        Args:
            prediction: t ``(P, 4)``, before the sigmoid.
            target: ``(P, 4)``: offsets in [0, 1] and log ratios, as ``GridCoder.offsets`` gives them.
            weights: ``(P,)``; ``None`` weighs all by 1.
        """
        growth = (prediction[:, 2:] - target[:, 2:]).square()  # (P, 2)
        if self.offset == "squared":
            place = (prediction[:, :2].sigmoid() - target[:, :2]).square()  # (P, 2)
        else:
            place = F.binary_cross_entropy_with_logits(prediction[:, :2], target[:, :2], reduction="none")  # (P, 2)
        return weighted_sum((place + growth).sum(dim=1), weights)


class ClassSoftmaxLoss(nn.Module):
    """The summed cross entropy of a softmax over classes that exclude each other."""

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over rows of ``(P, K)`` with labels ``(P,)`` in 0..K-1 and weights ``(P,)``, a scalar."""
        return weighted_sum(F.cross_entropy(logits, labels, reduction="none"), weights)


class LogisticLoss(nn.Module):
    """The summed cross entropy of K independent logistic regressions."""

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the sum over rows of ``(P, K)`` with labels ``(P,)`` in 0..K-1 and weights ``(P,)``, a scalar."""
        return bce_loss(logits, labels, weights)
