"""Non-maximum suppression as an object that a model is given: ``nms(boxes, scores, labels) -> keep``.

Greedy NMS as in `"Object Detection with Discriminatively Trained Part Based Models"
<https://doi.org/10.1109/TPAMI.2009.167>`_ (section 6.2), done apart for every label.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torchvision.ops import batched_nms


class Suppression(Protocol):
    """Anything that decides which of the overlapping boxes of one image stay."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the indices to keep ``(K,)`` int64, best score first.

        Args:
            boxes: ``(N, 4)`` xyxy pixels, finite.
            scores: ``(N,)``.
            labels: ``(N,)`` int64; boxes of different labels do not suppress each other.
        """
        ...


class BatchedNMS:
    """Greedy NMS per label.

    Args:
        threshold: a box is dropped where its IoU with a better one of its label exceeds this, in [0, 1].

    Raises:
        ValueError: the threshold lies outside [0, 1].
    """

    def __init__(self, *, threshold: float) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"BatchedNMS: threshold is {threshold}; an IoU lies in [0, 1]")
        self.threshold = threshold

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the indices to keep ``(K,)`` int64, best score first; see ``Suppression``."""
        # Half precision: torchvision's coordinate trick adds label offsets that float16 cannot hold.
        keep: Tensor = batched_nms(boxes.float(), scores.float(), labels, self.threshold)  # (K,)
        return keep

    def __repr__(self) -> str:
        return f"BatchedNMS(threshold={self.threshold})"
