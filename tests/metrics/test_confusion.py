from __future__ import annotations

import pytest
import torch

from detseg.metrics import BoxConfusion, CocoAP, MeanIoU
from detseg.structures import Detections, SemanticMap, Target

NAMES = ["apple", "pear"]


def rows(*values: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 4)


def truth(boxes: torch.Tensor, labels: list[int], crowd: list[bool] | None = None, image_id: int = 1) -> Target:
    iscrowd = torch.tensor(crowd or [False] * len(labels), dtype=torch.bool)
    return Target(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64), iscrowd=iscrowd, image_id=image_id)


def found(boxes: torch.Tensor, scores: list[float], labels: list[int]) -> Detections:
    return Detections(boxes, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def confusion(*pairs: tuple[Detections, Target]) -> list[list[int]]:
    metric = BoxConfusion(class_names=NAMES)
    for detections, target in pairs:
        metric.update([detections], [target])
    return metric.compute()["confusion"].tolist()


def test_right_wrong_missed_and_invented():
    boxes = rows((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    target = truth(boxes, [0, 1, 1])
    answer = found(torch.cat([boxes[:2], rows((70, 70, 80, 80))]), [0.9, 0.8, 0.7], [0, 0, 1])
    # apple as apple; a pear as apple, a pear missed; a pear where there is nothing
    assert confusion((answer, target)) == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_the_best_score_takes_the_object_and_its_twin_is_background():
    box = rows((0, 0, 10, 10))
    twice = found(torch.cat([box, box]), [0.4, 0.9], [1, 0])
    assert confusion((twice, truth(box, [0]))) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_low_scores_and_small_overlaps_do_not_count():
    box = rows((0, 0, 10, 10))
    weak = found(box, [0.29], [0])
    assert confusion((weak, truth(box, [0]))) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    beside = found(rows((0, 0, 10, 4.9)), [0.9], [0])
    assert confusion((beside, truth(box, [0]))) == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_crowds_are_neither_missed_nor_found():
    crowd = truth(rows((0, 0, 40, 40)), [0], [True])
    inside = found(rows((0, 0, 10, 10), (5, 5, 15, 15)), [0.9, 0.8], [0, 1])
    assert confusion((inside, crowd)) == [[0, 0, 0]] * 3


def test_empty_images_and_batches_add_up():
    box = rows((0, 0, 10, 10))
    nothing, empty = found(rows(), [], []), truth(rows(), [], image_id=2)
    assert confusion((nothing, empty)) == [[0] * 3] * 3
    pairs = [
        (found(box, [0.9], [1]), empty),
        (nothing, truth(box, [1], image_id=3)),
        (found(box, [0.9], [1]), truth(box, [1])),
    ]
    assert confusion(*pairs) == [[0, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_two_ranks_give_the_sum():
    box = rows((0, 0, 10, 10))
    first, second = BoxConfusion(class_names=NAMES), BoxConfusion(class_names=NAMES)
    first.update([found(box, [0.9], [0])], [truth(box, [0])])
    second.update([found(rows(), [], [])], [truth(box, [1])])
    first.confusion = first._reductions["confusion"](torch.stack([first.confusion, second.confusion]))
    assert first.compute()["confusion"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="iou is 0"):
        BoxConfusion(class_names=NAMES, iou=0)
    with pytest.raises(ValueError, match=r"image 1.*label 2.*0\.\.1"):
        BoxConfusion(class_names=NAMES).update([found(rows(), [], [])], [truth(rows((0, 0, 1, 1)), [2])])


def test_curves_of_coco_ap_and_the_matrix_of_mean_iou():
    """Two of three objects found, the false one between them: precision 1, then 2/3, then 0."""
    boxes = rows((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    metric = CocoAP(class_names=NAMES)
    wrong = rows((70, 70, 80, 80))
    metric.update(
        [found(torch.cat([boxes[:1], wrong, boxes[1:2]]), [0.9, 0.8, 0.7], [0, 0, 0])], [truth(boxes, [0] * 3)]
    )
    curve = metric.compute()["precision_50"]
    assert curve.shape == (2, 101) and bool(curve[1].isnan().all())
    assert curve[0, [0, 33, 34, 66, 67, 100]].tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])
    pixels = MeanIoU(num_classes=2)
    labels = torch.tensor([[0, 1], [1, 1]])
    semantic = Target(boxes=rows(), labels=torch.zeros(0).long(), semantic=SemanticMap(labels))
    pixels.update([SemanticMap(torch.zeros_like(labels))], [semantic])
    assert pixels.compute()["confusion"].tolist() == [[1, 0], [3, 0]]
