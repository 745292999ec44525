"""COCO's greedy matching of detections to objects, for all images and classes at once.

What pycocotools does in ``COCOeval.evaluateImg``, one (image, class), threshold and area range at a time: detections
choose, best score first; a detection takes the free object of highest IoU (of equal ones the last) that counts, or
failing that one that is ignored; crowds are never used up.

Here the groups, one per image and class, take turns together: in turn 0 the best detection of every group chooses, in
turn 1 the second, and so on. Only detections with a candidate object take part. The result is identical.

Letters: C candidates (detections that overlap some object enough), G objects, P pairs, A area ranges, T thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from detseg.metrics.base import Array
from detseg.metrics.overlaps import Pairs

AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""COCO's area ranges in square pixels, both ends included."""

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's ten thresholds, written as pycocotools writes them: the last bit decides ties."""


@dataclass(frozen=True)
class Matches:
    """Who matched, by candidate, area range and threshold.

    Attributes:
        candidate: ``(C,)`` int64, rows of detections, ascending; all other detections matched nothing.
        truth: ``(C, A, T)`` int32, row of the object, -1 where nothing matched.
        ignored: ``(C, A, T)`` bool, matched to an ignored object: neither true nor false positive.
    """

    candidate: Array
    truth: Array
    ignored: Array

    @property
    def counted(self) -> Array:
        """``(C, A, T)`` bool, matched to an object that counts: true positives."""
        return (self.truth >= 0) & ~self.ignored


def outside(area: Array, ranges: list[tuple[float, float]]) -> Array:
    """Return ``(n, A)`` bool: which areas ``(n,)`` lie outside which ranges, ends included."""
    low, high = np.array(ranges).T
    beyond: Array = (area[:, None] < low) | (area[:, None] > high)
    return beyond


def running_number(group: Array) -> Array:
    """Return for each row ``(n,)`` how many rows of its group came before it."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.searchsorted(ordered, ordered, side="left")
    number = np.empty(len(group), dtype=np.int64)
    number[order] = np.arange(len(group)) - first
    return number


def match(pairs: Pairs, group: Array, ignored: Array, crowd: Array, thresholds: Array) -> Matches:
    """Match detections to objects, greedily, best score first.

    Args:
        pairs: candidates; both sides of a pair belong to one group, and within a group a smaller row of a detection
            means that it chooses earlier.
        group: ``(G,)`` int64, the image and class of each object.
        ignored: ``(G, A)`` bool, objects that do not count, by area range (crowds among them).
        crowd: ``(G,)`` bool, objects that may be matched more than once.
        thresholds: ``(T,)`` least IoU.
    """
    candidate, pair_candidate = np.unique(pairs.detection, return_inverse=True)  # (C,), (P,)
    candidate_group = np.empty(len(candidate), dtype=np.int64)
    candidate_group[pair_candidate] = group[pairs.truth]
    turn = running_number(candidate_group)  # (C,)
    # Turn by turn, each candidate's best pair last; of equal IoUs COCO takes the later object.
    order = np.lexsort((pairs.truth, pairs.iou, pair_candidate, turn[pair_candidate]))
    chooser, truth = pair_candidate[order], pairs.truth[order]  # (P,)
    fits = pairs.iou[order][:, None] >= np.minimum(thresholds, 1 - 1e-10)  # (P, T)

    shape = (ignored.shape[1], len(thresholds))
    partner = np.full((len(candidate), *shape), -1, dtype=np.int32)  # (C, A, T)
    spared = np.zeros((len(candidate), *shape), dtype=bool)  # (C, A, T)
    taken = np.zeros((len(group), *shape), dtype=bool)  # (G, A, T)
    bounds = np.searchsorted(turn[chooser], np.arange(turn.max(initial=-1) + 2))
    for start, stop in pairwise(bounds):
        objects = truth[start:stop]  # (n,)
        first = np.flatnonzero(np.diff(chooser[start:stop], prepend=-1))  # (c,)
        who = chooser[start:stop][first]
        used = taken[objects] & ~crowd[objects, None, None]
        best = _best_pair(fits[start:stop], used, ignored[objects], first)  # (c, A, T)
        number = stop - start
        hit = best >= 0
        partner[who] = np.where(hit, objects[best % number], -1)
        spared[who] = hit & (best < number)
        row, area, threshold = np.nonzero(hit)
        taken[partner[who[row], area, threshold], area, threshold] = True
    return Matches(candidate, partner, spared)


def _best_pair(fits: Array, taken: Array, ignored: Array, first: Array) -> Array:
    """Return the pair each candidate chooses: ``(c, A, T)``, -1 for none, plus n where the object counts.

    Args:
        fits: ``(n, T)`` bool, which of the n pairs overlap enough; a candidate's pairs lie together, best last.
        taken: ``(n, A, T)`` bool, whether the pair's object is used up.
        ignored: ``(n, A)`` bool, whether the pair's object is ignored.
        first: ``(c,)`` where each candidate's pairs begin.
    """
    number = len(fits)
    worth = np.arange(number)[:, None] + np.where(ignored, 0, number)  # (n, A): an object that counts comes first
    value = np.where(fits[:, None, :] & ~taken, worth[:, :, None], -1)  # (n, A, T)
    if len(first) == number:
        return value  # one pair each: nothing to choose
    return np.maximum.reduceat(value, first, axis=0)
