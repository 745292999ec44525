"""VOC's figures worked out by hand, from the definition in the development kit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detseg.metrics import VocAP
from detseg.metrics.curves import area_precision, eleven_point_precision
from detseg.structures import Detections, Target
from metric_oracles import random_case

A, B, C, AWAY = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10], [100.0, 100, 110, 110]


def found(*rows: tuple[list[float], float, int]) -> Detections:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels).long()
    )


def truth(image_id: int, *rows: tuple[list[float], int, bool]) -> Target:
    boxes, labels, difficult = zip(*rows, strict=True) if rows else ((), (), ())
    return Target(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels).long(),
        difficult=torch.tensor(difficult, dtype=torch.bool),
        image_id=image_id,
    )


def both(detections: list[Detections], targets: list[Target], **options: float) -> tuple[float, float]:
    """Return the mean average precision in the form of 2007 and of 2010."""
    values = []
    for style in ("2007", "2010"):
        metric = VocAP(style=style, num_classes=2, **options)
        metric.update(detections, targets)
        values.append(float(metric.compute()["map"]))
    return values[0], values[1]


def test_a_curve_by_hand() -> None:
    # Three objects. By score: true, false, true, false. Recall 1/3, 1/3, 2/3, 2/3; precision 1, 1/2, 2/3, 1/2.
    # 11 points: levels 0..0.3 have 1, 0.4..0.6 have 2/3, 0.7..1 have 0: (4 + 3 * 2/3) / 11 = 6/11.
    # Area: 1/3 at precision 1, 1/3 at 2/3, 1/3 at 0: 1/3 + 2/9 = 5/9.
    detections = found((A, 0.9, 0), (AWAY, 0.8, 0), (B, 0.7, 0), (AWAY, 0.6, 0))
    target = truth(1, (A, 0, False), (B, 0, False), (C, 0, False))
    assert both([detections], [target]) == pytest.approx((6 / 11, 5 / 9), abs=1e-12)


def test_duplicates_are_false() -> None:
    # The second detection of A is false although A is there: recall 1/2, 1/2, 1; precision 1, 1/2, 2/3.
    # 11 points: levels 0..0.5 have 1, 0.6..1 have 2/3: (6 + 5 * 2/3) / 11 = 28/33. Area: 1/2 + 1/2 * 2/3 = 5/6.
    detections = found((A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0))
    assert both([detections], [truth(1, (A, 0, False), (B, 0, False))]) == pytest.approx((28 / 33, 5 / 6), abs=1e-12)


def test_a_taken_object_is_not_passed_on() -> None:
    # Unlike COCO, VOC gives the second detection to the object that it overlaps most (A, taken), not to the free one,
    # although it overlaps that one by more than a half as well: false. Boxes in a row, IoU with A 1, with D 9/11.
    near = [1.0, 0.0, 11.0, 10.0]
    detections = found((A, 0.9, 0), (A, 0.8, 0))
    assert both([detections], [truth(1, (A, 0, False), (near, 0, False))])[1] == pytest.approx(1 / 2)


def test_difficult_objects_are_neither_found_nor_missed() -> None:
    # A is difficult: the two detections on it vanish, and only B counts. Left: false, true of one object.
    # Precision 0, 1/2 at recall 0, 1: every level has 1/2.
    detections = found((A, 0.9, 0), (A, 0.85, 0), (AWAY, 0.8, 0), (B, 0.7, 0))
    target = truth(1, (A, 0, True), (B, 0, False))
    assert both([detections], [target]) == pytest.approx((1 / 2, 1 / 2), abs=1e-12)
    metric = VocAP(num_classes=2)
    metric.update([detections], [target])
    result = metric.compute()
    assert result["count_per_class"].tolist() == [1, 0] and int(result["count"]) == 1


def test_a_class_of_difficult_objects_alone_is_not_a_number() -> None:
    metric = VocAP(class_names=["apple", "pear"])
    metric.update([found((A, 0.9, 0), (B, 0.8, 1))], [truth(1, (A, 0, True), (B, 1, False))])
    result = metric.compute()
    expected = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    torch.testing.assert_close(result["map_per_class"], expected, equal_nan=True)
    assert float(result["map"]) == 1


def test_crowds_are_treated_as_difficult() -> None:
    target = truth(1, (A, 0, False), (B, 0, False))
    target.iscrowd = torch.tensor([True, False])
    assert both([found((A, 0.9, 0), (B, 0.8, 0))], [target]) == pytest.approx((1, 1))


def test_images_and_classes_are_apart() -> None:
    # A in image 2 is no object of image 1, and class 1 has its own curve: class 0 true; class 1 false then true.
    targets = [truth(1, (A, 0, False)), truth(2, (A, 1, False))]
    detections = [found((A, 0.9, 0), (A, 0.8, 1)), found((A, 0.7, 1))]
    assert both(detections, targets)[1] == pytest.approx((1 + 1 / 2) / 2)


def test_overlap_of_exactly_one_half_is_enough() -> None:
    half = [0.0, 0, 10, 5]
    assert both([found((half, 0.9, 0))], [truth(1, (A, 0, False))])[1] == 1
    assert both([found((half, 0.9, 0))], [truth(1, (A, 0, False))], iou_threshold=0.51)[1] == 0


def test_inclusive_pixels() -> None:
    # Pixels 0..9 x 0..9 and 0..9 x 0..4: 50 of 100 with the kit's + 1; 36 of 81 without.
    detection, target = found(([0.0, 0, 9, 4], 0.9, 0)), truth(1, ([0.0, 0, 9, 9], 0, False))
    assert both([detection], [target], inclusive=True)[1] == 1
    assert both([detection], [target], inclusive=False)[1] == 0


def test_levels_are_compared_in_whole_numbers() -> None:
    # 3 of 10 is recall 0.3: levels 0, 0.1, 0.2 and 0.3. In floats, 0:0.1:1 holds 0.30000000000000004.
    assert eleven_point_precision(np.array([1, 2, 3]), np.array([0, 0, 0]), 10) == pytest.approx(4 / 11)
    assert area_precision(np.array([1, 2, 3]), np.array([0, 0, 0]), 10) == pytest.approx(0.3)
    assert eleven_point_precision(np.zeros(0, np.int64), np.zeros(0, np.int64), 3) == 0


def devkit_precision(detections: list[Detections], targets: list[Target], label: int, style: str) -> float:
    """``VOCevaldet.m`` and ``VOCap.m``, line by line."""
    order = sorted(range(len(targets)), key=lambda i: targets[i].image_id)
    rows = [(float(detections[i].scores[n]), i, n) for i in order for n in range(len(detections[i]))]
    rows = [row for row in rows if detections[row[1]].labels[row[2]] == label]
    rows.sort(key=lambda row: -row[0])
    taken: set[tuple[int, int]] = set()
    positives = sum(int(((t.labels == label) & ~t.difficult & ~t.iscrowd).sum()) for t in targets)
    if positives == 0:
        return math.nan
    tp, fp = np.zeros(len(rows)), np.zeros(len(rows))
    for d, (_, i, n) in enumerate(rows):
        best, at = -math.inf, -1
        for g in range(len(targets[i])):
            if targets[i].labels[g] != label:
                continue
            overlap = overlap_of(detections[i].boxes[n].double(), targets[i].boxes[g].double())
            if overlap > best:
                best, at = overlap, g
        if best >= 0.5:
            if not (targets[i].difficult[at] or targets[i].iscrowd[at]):
                tp[d], fp[d] = ((i, at) not in taken), ((i, at) in taken)
                taken.add((i, at))
        else:
            fp[d] = 1
    tp, fp = tp.cumsum(), fp.cumsum()
    recall, precision = tp / positives, tp / np.maximum(tp + fp, 1)
    if style == "2007":
        return float(np.mean([precision[recall >= t / 10].max(initial=0) for t in range(11)]))
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def overlap_of(box: torch.Tensor, other: torch.Tensor) -> float:
    inter = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0).prod()
    return float(inter / ((box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - inter))


@pytest.mark.parametrize("style", ["2007", "2010"])
@pytest.mark.parametrize("seed", range(15))
def test_equal_to_the_devkit_line_by_line(seed: int, style: str) -> None:
    case = random_case(seed + 50)
    generator = torch.Generator().manual_seed(seed)
    for target in case.targets:
        target.difficult = torch.rand(len(target), generator=generator) < 0.3
    metric = VocAP(style=style, num_classes=case.num_classes)
    for pair in zip(case.detections, case.targets, strict=True):
        metric.update([pair[0]], [pair[1]])
    expected = [devkit_precision(case.detections, case.targets, k, style) for k in range(case.num_classes)]
    ours = metric.compute()["map_per_class"]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)


def test_arguments_and_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match=r"'2007' .* or '2010'"):
        VocAP(style="2008")
    with pytest.raises(ValueError, match="iou_threshold is 0"):
        VocAP(iou_threshold=0)
    with pytest.raises(ValueError, match="image 5: detection 0 has label 3"):
        VocAP(num_classes=2).update([found((A, 0.5, 3))], [truth(5)])
