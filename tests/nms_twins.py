"""Readable twins of NMS for tests: slow loops over lists of floats, after the papers, and scenes to try them on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

Scene = tuple[Tensor, Tensor, Tensor]
"""Boxes ``(N, 4)``, scores ``(N,)`` and labels ``(N,)``."""


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, thresholds: Sequence[float]) -> list[int]:
    """Return the rows kept, best first; a kept row drops those of its label that overlap it more than its threshold."""
    box, score, label = boxes.tolist(), scores.tolist(), labels.tolist()
    kept: list[int] = []
    for row in sorted(range(len(box)), key=lambda row: (-score[row], row)):
        if all(label[row] != label[top] or iou(box[top], box[row]) <= thresholds[top] for top in kept):
            kept.append(row)
    return kept


def soft(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: str,
    sigma: float,
    threshold: float,
    score_threshold: float,
) -> tuple[list[int], list[float]]:
    """Return the rows in the order of taking and the scores that they were taken at (Soft-NMS, figure 2)."""
    box, score, label = boxes.tolist(), scores.tolist(), labels.tolist()
    left = [row for row in range(len(box)) if score[row] >= score_threshold]
    kept, lowered = [], []
    while left:
        top = min(left, key=lambda row: (-score[row], row))
        left.remove(top)
        kept.append(top)
        lowered.append(score[top])
        for row in left:
            if label[row] == label[top]:
                overlap = iou(box[top], box[row])
                if method == "gaussian":
                    score[row] *= math.exp(-(overlap**2) / sigma)
                elif overlap >= threshold:
                    score[row] *= 1 - overlap
        left = [row for row in left if score[row] >= score_threshold]
    return kept, lowered


def _scene(numbers: bytes) -> Scene:
    rows = [numbers[start : start + 6] for start in range(0, len(numbers) - 5, 6)]
    boxes = [[x % 8, y % 8, x % 8 + w % 9, y % 8 + h % 9] for x, y, w, h, _, _ in rows]
    scores = torch.tensor([row[4] % 7 / 8 for row in rows], dtype=torch.float32)
    labels = torch.tensor([row[5] // 100 for row in rows], dtype=torch.int64)
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), scores, labels


def scenes(most: int = 24) -> st.SearchStrategy[Scene]:
    """Up to ``most`` boxes on a small grid: many that overlap, that are equal or empty, with equal scores; 3 labels."""
    return st.binary(max_size=6 * most).map(_scene)


def by_density(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, threshold: float, duplicate_iou: float, object_score: float
) -> list[int]:
    """Return the rows kept where N_M = max(N_t, d_M), d by the confident peaks of other objects."""
    peaks = greedy(boxes, scores, labels, [duplicate_iou] * len(boxes))
    box, score, label = boxes.tolist(), scores.tolist(), labels.tolist()
    limits = [threshold] * len(box)
    for row in range(len(box)):
        for peak in peaks:
            overlap = iou(box[row], box[peak])
            if peak != row and label[peak] == label[row] and score[peak] >= object_score and overlap <= duplicate_iou:
                limits[row] = max(limits[row], overlap)
    return greedy(boxes, scores, labels, limits)
