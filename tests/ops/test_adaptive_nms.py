from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from detseg.ops import adaptive_nms as module
from detseg.ops.adaptive_nms import DensityAdaptiveNMS, SizeAdaptiveNMS, crowd_density, greedy_nms, size_thresholds
from detseg.ops.nms import BatchedNMS
from nms_twins import Scene, by_density, greedy, scenes

NONE = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
BOTH = [SizeAdaptiveNMS(), DensityAdaptiveNMS()]


def beside(side: float, overlap: float) -> list[list[float]]:
    """Two squares whose IoU is ``overlap``: what they share is 2 * IoU / (1 + IoU) of one."""
    shift = side * (1 - 2 * overlap / (1 + overlap))
    return [[0.0, 0.0, side, side], [shift, 0.0, side + shift, side]]


def drawn(count: int, classes: int) -> Scene:
    corner = torch.rand(count, 2) * 300
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * 80 + 1], dim=1)
    return boxes, torch.rand(count), torch.randint(0, classes, (count,))


@given(scenes(), st.data())
def test_every_box_has_its_own_threshold(scene: Scene, data: st.DataObject) -> None:
    limit = st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 1.0])
    limits = data.draw(st.lists(limit, min_size=len(scene[0]), max_size=len(scene[0])))
    keep = greedy_nms(*scene, torch.tensor(limits, dtype=torch.float64))
    assert keep.tolist() == greedy(*scene, limits)


@pytest.mark.parametrize("count, classes", [(400, 1), (3000, 5)])
def test_one_threshold_for_all_is_greedy_nms(count: int, classes: int) -> None:
    scene = drawn(count, classes)
    plain, scores = BatchedNMS(threshold=0.4)(*scene)
    assert 10 < len(plain) < count
    assert_close(greedy_nms(*scene, torch.full((count,), 0.4)), plain)
    size = SizeAdaptiveNMS(threshold=0.4, small_offset=0.0, large_offset=0.0)
    assert_close(size(*scene), (plain, scores), rtol=0, atol=0)
    nobody = DensityAdaptiveNMS(threshold=0.4, object_score=2.0)
    assert_close(nobody(*scene), (plain, scores), rtol=0, atol=0)


def test_negative_scores_are_scores() -> None:
    scores = torch.tensor([-3.0, -1.0, 0.0])
    keep = greedy_nms(torch.tensor([[0.0, 0, 9, 9]] * 3), scores, torch.tensor([0, 0, 1]), torch.full((3,), 0.5))
    assert keep.tolist() == [2, 1]


def test_size_thresholds_by_hand() -> None:
    sides = torch.tensor([0.0, 16, 32, 64, 128, 1000])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], dim=1)  # the root of the area is the side
    limits = size_thresholds(boxes, 0.5, (-0.2, 0.1), (32.0, 128.0))
    assert_close(limits, torch.tensor([0.3, 0.3, 0.3, 0.45, 0.6, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("side, stays", [(20.0, False), (32.0, False), (200.0, True)])
def test_duplicates_of_small_boxes_go_sooner(side: float, stays: bool) -> None:
    boxes = torch.tensor(beside(side, 0.5))
    keep, scores = SizeAdaptiveNMS()(boxes, torch.tensor([0.8, 0.9]), torch.zeros(2, dtype=torch.int64))
    assert keep.tolist() == ([1, 0] if stays else [1])
    assert_close(scores, torch.tensor([0.9, 0.8] if stays else [0.9]), rtol=0, atol=0)


def test_the_better_box_decides() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 50]])  # IoU 0.5; sides 100 and 71
    nms = SizeAdaptiveNMS(small_side=71.0, large_side=100.0)
    labels = torch.zeros(2, dtype=torch.int64)
    assert nms(boxes, torch.tensor([0.9, 0.8]), labels)[0].tolist() == [0, 1]  # 0.6
    assert nms(boxes, torch.tensor([0.8, 0.9]), labels)[0].tolist() == [1]  # 0.4


@given(scenes())
def test_by_size_equals_its_twin(scene: Scene) -> None:
    nms = SizeAdaptiveNMS(threshold=0.4, small_offset=-0.3, large_offset=0.4, small_side=2.0, large_side=7.0)
    sides = [math.sqrt((box[2] - box[0]) * (box[3] - box[1])) for box in scene[0].tolist()]
    share = [0.0 if side <= 2 else min(math.log(side / 2) / math.log(3.5), 1.0) for side in sides]
    keep, scores = nms(*scene)
    assert keep.tolist() == greedy(*scene, [0.1 + 0.7 * part for part in share])
    assert_close(scores, scene[1][keep], rtol=0, atol=0)


def test_density_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
    labels = torch.zeros(4, dtype=torch.int64)
    density = crowd_density(boxes, labels, torch.tensor([0, 1, 3]), 0.7)
    assert_close(density, torch.tensor([0.5, 0.5, 0.4, 0.0], dtype=torch.float64))
    density = crowd_density(boxes, labels, torch.tensor([0, 1, 3]), 0.45)  # the first two are now one object
    assert_close(density, torch.tensor([0.0, 0.0, 0.4, 0.0], dtype=torch.float64))
    density = crowd_density(boxes, torch.tensor([0, 1, 1, 0]), torch.arange(4), 0.7)
    assert_close(density, torch.tensor([0.0, 0.4, 0.4, 0.0], dtype=torch.float64))
    assert crowd_density(boxes, labels, torch.arange(0), 0.7).tolist() == [0, 0, 0, 0]


def test_two_confident_objects_stay_and_a_single_one_drops_its_duplicate() -> None:
    boxes, labels = torch.tensor(beside(100, 0.6)), torch.zeros(2, dtype=torch.int64)
    nms = DensityAdaptiveNMS()
    assert nms(boxes, torch.tensor([0.9, 0.8]), labels)[0].tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.9, 0.4]), labels)[0].tolist() == [0]  # nothing says that the second is an object
    assert nms(torch.tensor(beside(100, 0.75)), torch.tensor([0.9, 0.8]), labels)[0].tolist() == [0]
    assert BatchedNMS(threshold=0.5)(boxes, torch.tensor([0.9, 0.8]), labels)[0].tolist() == [0]


@given(
    scenes(), st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.5, 2 / 3, 1.0]), st.sampled_from([0.0, 0.4, 9.0])
)
def test_by_density_equals_its_twin(scene: Scene, threshold: float, duplicate_iou: float, object_score: float) -> None:
    settings = {"threshold": threshold, "duplicate_iou": duplicate_iou, "object_score": object_score}
    keep, scores = DensityAdaptiveNMS(**settings)(*scene)
    assert keep.tolist() == by_density(*scene, **settings)
    assert_close(scores, scene[1][keep], rtol=0, atol=0)


@pytest.mark.parametrize("classes", [1, 6])
def test_by_density_lies_between_greedy_at_both_thresholds(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAIRS", 10_000)  # several parts
    scene = drawn(400, classes)
    keep = DensityAdaptiveNMS()(*scene)[0]
    assert keep.tolist() == by_density(*scene, threshold=0.5, duplicate_iou=0.7, object_score=0.5)
    assert len(BatchedNMS(threshold=0.5)(*scene)[0]) < len(keep) < len(BatchedNMS(threshold=0.7)(*scene)[0])


@pytest.mark.parametrize("nms", BOTH, ids=repr)
def test_empty_input(nms: SizeAdaptiveNMS | DensityAdaptiveNMS) -> None:
    keep, scores = nms(*NONE)
    assert keep.shape == scores.shape == (0,) and keep.dtype == torch.int64 and scores.dtype == torch.float32


@pytest.mark.parametrize("nms", BOTH, ids=repr)
def test_numbers_that_are_not_finite_are_refused(nms: SizeAdaptiveNMS | DensityAdaptiveNMS) -> None:
    boxes, scores, labels = drawn(5, 2)
    scores[3] = math.nan
    with pytest.raises(ValueError, match=f"{type(nms).__name__}: score 3 of 5 is nan"):
        nms(boxes, scores, labels)
    boxes[2, 0] = -math.inf
    with pytest.raises(ValueError, match=rf"{type(nms).__name__}: box 2 of 5 is \[-inf"):
        nms(boxes, scores, labels)


@pytest.mark.parametrize("kind", [SizeAdaptiveNMS, DensityAdaptiveNMS])
def test_ties_in_order_and_across_labels_on_demand(kind: type[SizeAdaptiveNMS | DensityAdaptiveNMS]) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [40, 40, 49, 49], [0, 0, 9, 9], [40, 40, 49, 49]])
    scores, labels = torch.full((4,), 0.5), torch.tensor([1, 0, 0, 0])
    assert kind()(boxes, scores, labels)[0].tolist() == [0, 1, 2]
    assert kind(class_agnostic=True)(boxes, scores, labels)[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SizeAdaptiveNMS(threshold=0.95), "threshold + large_offset is 1.05; an IoU lies in [0, 1]"),
        (lambda: SizeAdaptiveNMS(small_side=96.0), "small_side is 96.0 and large_side 96.0; they must be pixels"),
        (lambda: DensityAdaptiveNMS(threshold=0.8), "threshold is 0.8 and duplicate_iou 0.7"),
        (lambda: DensityAdaptiveNMS(duplicate_iou=7), "duplicate_iou is 7; an IoU lies in [0, 1]"),
    ],
)
def test_arguments_outside_their_range(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.gpu
@pytest.mark.parametrize("nms", BOTH, ids=repr)
def test_on_a_gpu_as_on_the_host(nms: SizeAdaptiveNMS | DensityAdaptiveNMS) -> None:
    scene = drawn(500, 3)
    keep, scores = nms(*(tensor.cuda() for tensor in scene))
    assert keep.is_cuda and scores.is_cuda
    assert_close((keep.cpu(), scores.cpu()), nms(*scene), rtol=0, atol=0)
