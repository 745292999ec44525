"""Precision over recall and what is read off it: COCO's 101 points, VOC's 11 points and the exact area.

Letters: n points of a curve, best score first; T thresholds; R recall levels.
"""

from __future__ import annotations

import numpy as np

from detseg.metrics.base import Array

RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
"""COCO's 101 levels of recall, as pycocotools writes them."""


def envelope(precision: Array) -> Array:
    """Return for each point ``(n, ...)`` the best precision at this or any higher recall."""
    return np.maximum.accumulate(precision[::-1], axis=0)[::-1]


def precision_at_recalls(true: Array, false: Array, positives: int, levels: Array = RECALL_LEVELS) -> Array:
    """Return the interpolated precision at given levels of recall, as ``COCOeval.accumulate`` computes it.

    Args:
        true: ``(n, T)`` numbers of true positives down to each point.
        false: ``(n, T)`` numbers of false positives down to each point.
        positives: objects that count, at least 1.
        levels: ``(R,)`` ascending.

    Returns:
        ``(R, T)``; 0 at levels that are not reached. Points where no true positive appears may be left out: none is
        ever read.
    """
    number, thresholds = true.shape
    precision = np.zeros((number + 1, thresholds))  # the last row is read where a level is not reached
    precision[:-1] = envelope(true / (false + true + np.spacing(1)))
    recall = true / positives
    at = np.stack([np.searchsorted(recall[:, t], levels, side="left") for t in range(thresholds)], axis=1)  # (R, T)
    return np.take_along_axis(precision, at, axis=0)


def eleven_point_precision(true: Array, false: Array, positives: int) -> float:
    """Return VOC 2007's average precision: the mean of the best precision at recall >= 0, 0.1, ..., 1.

    The levels are compared as whole numbers, 10 * true >= i * positives, so that 3 of 10 reaches recall 0.3; in
    floating point ``0:0.1:1`` holds 0.30000000000000004 and misses it.

    Args:
        true: ``(n,)`` int64, true positives down to each point.
        false: ``(n,)`` int64.
        positives: objects that count, at least 1.
    """
    precision = true / np.maximum(true + false, 1)
    best = [precision[10 * true >= level * positives].max(initial=0.0) for level in range(11)]
    return float(np.mean(best))


def area_precision(true: Array, false: Array, positives: int) -> float:
    """Return VOC 2010's average precision: the area under the envelope of precision over recall.

    Args:
        true: ``(n,)`` int64, true positives down to each point.
        false: ``(n,)`` int64.
        positives: objects that count, at least 1.
    """
    precision = envelope(true / np.maximum(true + false, 1))
    return float(np.sum(np.diff(true, prepend=0) * precision) / positives)
