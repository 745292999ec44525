"""Non-maximum suppression as an object that a model is given: ``nms(boxes, scores, labels) -> (keep, scores)``.

Greedy NMS as in `"Object Detection with Discriminatively Trained Part Based Models"
<https://doi.org/10.1109/TPAMI.2009.167>`_ (section 6.2), done apart for every label. Beside it: ``ops.soft_nms`` lowers
scores where this drops boxes, ``ops.adaptive_nms`` gives every box a threshold of its own.

Letters: N boxes of one image, K of them kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.ops import nms as greedy_nms

from detseg.structures import Detections


class Suppression(Protocol):
    """Anything that decides which of the overlapping boxes of one image stay, and with which scores."""

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices kept ``(K,)`` int64, best first, and their scores ``(K,)``, descending.

        Scores are those given, or lowered ones (Soft-NMS). Of equal scores the earlier row is the better one.

        Args:
            boxes: ``(N, 4)`` xyxy pixels, finite.
            scores: ``(N,)``, finite.
            labels: ``(N,)`` int64; boxes of different labels do not suppress each other.

        Raises:
            ValueError: shapes disagree, or a coordinate or score is not finite. Numbers on a GPU are not looked at
                where this alone would make the host wait.
        """
        ...


class BatchedNMS:
    """Greedy NMS per label; scores stay as they are.

    Args:
        threshold: a box is dropped where its IoU with a better one of its label exceeds this, in [0, 1].
        class_agnostic: boxes of different labels suppress each other too.

    Raises:
        ValueError: the threshold lies outside [0, 1].
    """

    def __init__(self, *, threshold: float, class_agnostic: bool = False) -> None:
        check_share("BatchedNMS", threshold=threshold)
        self.threshold = threshold
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``(K,)`` and scores ``(K,)``, best first; see ``Suppression``."""
        check_candidates("BatchedNMS", boxes, scores, labels)
        # Half precision: torchvision's coordinate trick adds label offsets that float16 cannot hold.
        if self.class_agnostic:
            keep: Tensor = greedy_nms(boxes.float(), scores.float(), self.threshold)  # (K,)
        else:
            keep = batched_nms(boxes.float(), scores.float(), labels, self.threshold)  # (K,)
            keep = keep.sort().values  # of many boxes torchvision returns equal scores in any order
            keep = keep[scores[keep].argsort(descending=True, stable=True)]  # (K,)
        return keep, scores[keep]

    def __repr__(self) -> str:
        return f"BatchedNMS(threshold={self.threshold}, class_agnostic={self.class_agnostic})"


def suppress_per_image(
    boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, sizes: Tensor, *, nms: Suppression, most: int
) -> list[Detections]:
    """Clip the candidates of all images and do NMS image by image.

    Args:
        boxes: ``(C, 4)`` xyxy pixels.
        scores: ``(C,)``.
        labels: ``(C,)`` int64.
        image: ``(C,)`` int64, ascending.
        sizes: ``(B, 2)``, height and width that boxes are clipped to.
        nms: of one image.
        most: how many detections per image stay.
    """
    counts = torch.bincount(image, minlength=len(sizes)).tolist()
    found = []
    parts = (torch.split(tensor, counts) for tensor in (boxes, scores, labels))  # 3 x B x (n, ...)
    for size, box, own_score, own_label in zip(sizes.tolist(), *parts, strict=True):
        clipped = clip_boxes_to_image(box, (size[0], size[1]))  # (n, 4)
        keep, lowered = nms(clipped, own_score, own_label)  # (k,) each
        best = keep[:most]
        found.append(Detections(boxes=clipped[best], scores=lowered[: len(best)], labels=own_label[best]))
    return found


def check_share(owner: str, **values: float) -> None:
    """Raise unless every value lies in [0, 1].

    Raises:
        ValueError: one does not; the message names it.
    """
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{owner}: {name} is {value}; an IoU lies in [0, 1]")


def check_candidates(owner: str, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Raise unless boxes, scores and labels fit together and, where they lie in host memory, are finite.

    Args:
        owner: who asks, for the message.
        boxes: ``(N, 4)``.
        scores: ``(N,)``.
        labels: ``(N,)``.

    Raises:
        ValueError: a shape is wrong or a number is not finite; the message names the row and the value.
    """
    count = len(scores)
    if boxes.shape != (count, 4) or scores.ndim != 1 or labels.shape != (count,):
        raise ValueError(
            f"{owner}: boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)} and labels {tuple(labels.shape)} do "
            "not fit; they must be (N, 4), (N,) and (N,)"
        )
    if boxes.device.type != "cpu":
        return  # asking would make the host wait for the device
    for name, values in (("box", boxes), ("score", scores)):
        if not bool(values.isfinite().all()):
            row = int((~values.reshape(count, -1).isfinite()).any(dim=1).nonzero()[0, 0])
            raise ValueError(
                f"{owner}: {name} {row} of {count} is {values[row].tolist()}; every number must be finite: drop such "
                "rows before NMS (detseg.ops.boxes.large_enough finds boxes)"
            )
