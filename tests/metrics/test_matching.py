from __future__ import annotations

import numpy as np
import pytest

from detseg.metrics.matching import IOU_THRESHOLDS, match, outside, running_number
from detseg.metrics.overlaps import Pairs


def match_slowly(
    iou: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, threshold: float
) -> tuple[list[int], list[bool]]:
    """COCO's matching of one group at one threshold, as one would explain it.

    Args:
        iou: (N, G), detections best first.
        ignored: (G,), objects that do not count.
        crowd: (G,), objects that are never used up.
        threshold: least IoU.

    Returns:
        the object of each detection, -1 for none, and whether that object is ignored.
    """
    used: set[int] = set()
    partner, spared = [], []
    for row in iou:
        choice = -1
        for wanted in (False, True):  # objects that count first
            for g in range(len(ignored)):
                free = g not in used or crowd[g]
                if ignored[g] != wanted or not free or row[g] < threshold:
                    continue
                if choice == -1 or row[g] >= row[choice]:  # of equal ones the later
                    choice = g
            if choice != -1:
                break
        used.add(choice)
        partner.append(choice)
        spared.append(choice != -1 and bool(ignored[choice]))
    return partner, spared


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_the_slow_twin(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = int(random.integers(1, 6))
    number = random.integers(0, 12, groups)  # detections per group
    objects = random.integers(0, 6, groups)
    crowd = random.random(objects.sum()) < 0.3
    ignored = crowd[:, None] | (random.random((objects.sum(), 4)) < 0.4)
    group = np.repeat(np.arange(groups), objects)
    tables = [random.choice([0.3, 0.5, 0.6, 0.75, 0.8, 0.95], (n, g)) for n, g in zip(number, objects, strict=True)]
    first, truth_first = np.cumsum(number) - number, np.cumsum(objects) - objects
    parts = []
    for table, n, g in zip(tables, first, truth_first, strict=True):
        row, column = np.nonzero(table >= 0.5)
        parts.append(Pairs(row + n, column + g, table[row, column]))
    pairs = Pairs.join(parts)
    mixed = random.permutation(len(pairs))
    pairs = Pairs(pairs.detection[mixed], pairs.truth[mixed], pairs.iou[mixed])
    matches = match(pairs, group, ignored, crowd, IOU_THRESHOLDS)

    partner = np.full((number.sum(), 4, 10), -1)
    spared = np.zeros_like(partner, dtype=bool)
    partner[matches.candidate], spared[matches.candidate] = matches.truth, matches.ignored
    for table, n, g in zip(tables, first, truth_first, strict=True):
        mine, theirs = slice(n, n + len(table)), slice(g, g + table.shape[1])
        for a in range(4):
            for t, threshold in enumerate(IOU_THRESHOLDS):
                who, passed = match_slowly(table, ignored[theirs, a], crowd[theirs], threshold)
                assert partner[mine, a, t].tolist() == [w + g if w >= 0 else -1 for w in who]
                assert spared[mine, a, t].tolist() == passed
    np.testing.assert_array_equal(matches.counted, (matches.truth >= 0) & ~matches.ignored)


def test_no_pairs() -> None:
    none = np.zeros(0, dtype=np.int64)
    matches = match(Pairs.join([]), none, np.zeros((0, 4), bool), np.zeros(0, bool), IOU_THRESHOLDS)
    assert matches.candidate.shape == (0,)
    assert matches.counted.shape == (0, 4, 10)


def test_thresholds_are_pycocotools_own() -> None:
    from pycocotools.cocoeval import Params

    assert Params("bbox").iouThrs.tolist() == IOU_THRESHOLDS.tolist()


def test_area_ranges_hold_both_ends() -> None:
    areas = np.array([-1.0, 0.0, 1024.0, 9216.0, 1e10, 2e10])
    beyond = outside(areas, [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)])
    assert (~beyond).sum(axis=1).tolist() == [0, 2, 3, 3, 2, 0]


def test_running_number() -> None:
    assert running_number(np.array([7, 3, 7, 7, 3])).tolist() == [0, 0, 1, 2, 1]
    assert running_number(np.zeros(0, dtype=np.int64)).tolist() == []
