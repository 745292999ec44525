"""Overlaps between detections and objects, for the pairs that can match and no others. NumPy, float64, exact.

Letters: N detections, G objects, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from detseg.metrics.base import Array

CHUNK = 1 << 20  # pairs looked at together: about 100 MB of temporaries
MASK_CHUNK = 1 << 24  # bytes of packed mask looked at together


@dataclass(frozen=True)
class Pairs:
    """Detections and objects that overlap enough to be matched.

    Attributes:
        detection: ``(P,)`` int64, row of the detection.
        truth: ``(P,)`` int64, row of the object.
        iou: ``(P,)`` float64; for a crowd the share of the detection that lies in it.
    """

    detection: Array
    truth: Array
    iou: Array

    def __len__(self) -> int:
        return len(self.iou)

    @classmethod
    def join(cls, parts: list[Pairs]) -> Pairs:
        """Return all pairs of a list, in order; an empty list gives no pairs."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            detection=np.concatenate([empty, *(part.detection for part in parts)]),
            truth=np.concatenate([empty, *(part.truth for part in parts)]),
            iou=np.concatenate([np.zeros(0), *(part.iou for part in parts)]),
        )


def same_group(detection_group: Array, truth_group: Array, chunk: int = CHUNK) -> Iterator[tuple[Array, Array]]:
    """Yield every (detection, object) of equal group, at most about ``chunk`` pairs at a time.

    Args:
        detection_group: ``(N,)`` int64, for instance image * num_classes + label.
        truth_group: ``(G,)`` int64.
        chunk: where to cut; one object's pairs are never cut.

    Yields:
        two ``(P,)`` int64 arrays: rows of detections and rows of objects.
    """
    by_group = np.argsort(detection_group, kind="stable")
    sorted_group = detection_group[by_group]
    first = np.searchsorted(sorted_group, truth_group, side="left")  # (G,)
    number = np.searchsorted(sorted_group, truth_group, side="right") - first  # (G,)
    total = np.cumsum(number)
    start = 0
    while start < len(truth_group):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + chunk, side="right")))
        count = number[start:stop]
        truth = np.repeat(np.arange(start, stop), count)
        offset = np.repeat(first[start:stop] - (total[start:stop] - count - before), count)
        if len(truth):
            yield by_group[offset + np.arange(len(truth))], truth
        start = stop


def box_iou(boxes: Array, others: Array, crowd: Array, pixel: float = 0.0) -> Array:
    """Return the IoU of boxes row by row, in the very steps of pycocotools' ``bbIou``, hence equal in every bit.

    Args:
        boxes: ``(P, 4)`` xyxy of detections.
        others: ``(P, 4)`` xyxy of objects.
        crowd: ``(P,)`` bool; a crowd's overlap is divided by the detection's area alone.
        pixel: 1.0 where the second corner is the last pixel inside, as in the VOC devkit; 0.0 where it is the edge.

    Returns:
        ``(P,)`` float64.
    """
    size, other_size = boxes[:, 2:] - boxes[:, :2] + pixel, others[:, 2:] - others[:, :2] + pixel  # (P, 2)
    # COCO stores corner and size, so its far corner is their sum, which may differ from x2 in the last bit.
    far = np.minimum(size + boxes[:, :2], other_size + others[:, :2])
    overlap = np.maximum(far - np.maximum(boxes[:, :2], others[:, :2]), 0.0)  # (P, 2)
    inter = overlap[:, 0] * overlap[:, 1]
    area = size[:, 0] * size[:, 1]
    union = np.where(crowd, area, area + other_size[:, 0] * other_size[:, 1] - inter)
    iou: Array = np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)
    return iou


def box_pairs(
    boxes: Array,
    group: Array,
    truth_boxes: Array,
    truth_group: Array,
    crowd: Array,
    *,
    minimum: float,
    pixel: float = 0.0,
) -> Pairs:
    """Return the pairs of equal group whose boxes overlap by at least ``minimum``.

    Args:
        boxes: ``(N, 4)`` xyxy of detections.
        group: ``(N,)`` int64; only rows of equal group can match, for instance one class in one image.
        truth_boxes: ``(G, 4)``.
        truth_group: ``(G,)``.
        crowd: ``(G,)`` bool.
        minimum: least IoU of a pair.
        pixel: see ``box_iou``.
    """
    parts = []
    for detection, truth in same_group(group, truth_group):
        iou = box_iou(boxes[detection], truth_boxes[truth], crowd[truth], pixel)
        near = iou >= minimum
        parts.append(Pairs(detection[near], truth[near], iou[near]))
    return Pairs.join(parts)


def pack_masks(masks: torch.Tensor) -> Array:
    """Pack bool masks ``(N, H, W)`` into ``(N, ceil(H * W / 64))`` uint64, on the CPU."""
    flat = masks.detach().flatten(1).cpu().numpy()
    packed = np.packbits(flat, axis=1)
    missing = -packed.shape[1] % 8
    return np.pad(packed, ((0, 0), (0, missing))).view(np.uint64)


def packed_areas(packed: Array) -> Array:
    """Return the number of set pixels of each packed mask ``(N, L)``: ``(N,)`` int64."""
    areas: Array = np.bitwise_count(packed).sum(axis=1, dtype=np.int64)
    return areas


def mask_iou(masks: Array, others: Array, detection: Array, truth: Array, crowd: Array) -> Array:
    """Return the IoU of pairs of packed masks, equal to pycocotools' ``rleIou``.

    Args:
        masks: ``(N, L)`` uint64 from ``pack_masks``, of detections.
        others: ``(G, L)`` uint64, of objects.
        detection: ``(P,)`` rows of ``masks``.
        truth: ``(P,)`` rows of ``others``.
        crowd: ``(G,)`` bool; a crowd's overlap is divided by the detection's area alone.

    Returns:
        ``(P,)`` float64; 0 where the masks do not touch, empty masks among them.
    """
    step = max(1, MASK_CHUNK // max(1, masks.shape[1] * 8))
    parts = [
        packed_areas(masks[detection[at : at + step]] & others[truth[at : at + step]])
        for at in range(0, len(detection), step)
    ]
    inter = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    area = packed_areas(masks)[detection]
    union = np.where(crowd[truth], area, area + packed_areas(others)[truth] - inter)
    iou: Array = np.divide(inter, union, out=np.zeros(len(inter)), where=inter > 0)
    return iou
