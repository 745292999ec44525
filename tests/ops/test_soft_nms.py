from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from detseg.ops.soft_nms import METHODS, SoftNMS
from nms_twins import Scene, scenes, soft

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
SCORES = torch.tensor([0.9, 0.8, 0.6, 0.7])
LABELS = torch.zeros(4, dtype=torch.int64)
SETTINGS = {"sigma": 0.5, "threshold": 0.3, "score_threshold": 0.001}


def drawn(count: int, objects: int, classes: int) -> Scene:
    """Boxes in heaps around objects, as a detector gives them."""
    heap = torch.arange(count) % objects
    centre = torch.rand(objects, 2)[heap] * 600 + torch.randn(count, 2) * 8
    side = (torch.rand(objects, 2)[heap] * 80 + 20) * (torch.randn(count, 2) * 0.2).exp()
    return torch.cat([centre - side / 2, centre + side / 2], dim=1), torch.rand(count), heap % classes


def test_gaussian_by_hand() -> None:
    # IoU: 0.5 of the first two, 0.2 of the first and third, 0.4 of the second and third.
    keep, scores = SoftNMS()(BOXES, SCORES, LABELS)
    assert keep.tolist() == [0, 3, 2, 1]
    third = 0.6 * math.exp(-(0.2**2) / 0.5)
    second = 0.8 * math.exp(-(0.5**2) / 0.5) * math.exp(-(0.4**2) / 0.5)
    assert_close(scores, torch.tensor([0.9, 0.7, third, second]))


def test_linear_by_hand() -> None:
    keep, scores = SoftNMS(method="linear")(BOXES, SCORES, LABELS)
    assert keep.tolist() == [0, 3, 2, 1]  # 0.2 leaves the third alone; it then lowers the second
    assert_close(scores, torch.tensor([0.9, 0.7, 0.6, 0.8 * 0.5 * 0.6]))
    keep, scores = SoftNMS(method="linear", threshold=0.45)(BOXES, SCORES, LABELS)
    assert_close(scores, torch.tensor([0.9, 0.7, 0.6, 0.8 * 0.5]))


def test_an_iou_at_the_threshold_is_lowered() -> None:
    _, scores = SoftNMS(method="linear", threshold=0.5)(BOXES[:2], SCORES[:2], LABELS[:2])
    assert_close(scores, torch.tensor([0.9, 0.4]))


def test_boxes_below_the_score_threshold_are_dropped_and_lower_no_other() -> None:
    keep, scores = SoftNMS(method="linear", score_threshold=0.45)(BOXES, SCORES, LABELS)
    assert keep.tolist() == [0, 3, 2]
    assert_close(scores, torch.tensor([0.9, 0.7, 0.6]))
    keep, _ = SoftNMS(score_threshold=0.65)(BOXES, SCORES, LABELS)
    assert keep.tolist() == [0, 3]


@pytest.mark.parametrize("method", METHODS)
@given(scene=scenes(), sigma=st.sampled_from([0.05, 0.5, 2.0]), score_threshold=st.sampled_from([0.0, 0.001, 0.3]))
def test_equals_its_twin(method: str, scene: Scene, sigma: float, score_threshold: float) -> None:
    settings = {"method": method, "sigma": sigma, "threshold": 0.25, "score_threshold": score_threshold}
    keep, scores = SoftNMS(**settings)(*scene)
    rows, lowered = soft(*scene, **settings)
    assert keep.tolist() == rows
    assert_close(scores, torch.tensor(lowered, dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count, objects, classes", [(600, 20, 1), (600, 40, 7), (300, 1, 1), (200, 200, 200)])
def test_equals_its_twin_on_what_detectors_give(method: str, count: int, objects: int, classes: int) -> None:
    scene = drawn(count, objects, classes)
    keep, scores = SoftNMS(method=method)(*scene)
    rows, lowered = soft(*scene, method=method, **SETTINGS)
    assert keep.tolist() == rows and len(rows) > 5
    assert_close(scores, torch.tensor(lowered, dtype=torch.float32))
    assert (scores.diff() <= 0).all() and (scores <= scene[1][keep]).all()


@pytest.mark.parametrize("method", METHODS)
def test_many_equal_boxes_with_equal_scores(method: str) -> None:
    boxes, scores = BOXES[:1].repeat(200, 1), torch.full((200,), 0.5)
    keep, lowered = SoftNMS(method=method, score_threshold=0.0)(boxes, scores, torch.zeros(200, dtype=torch.int64))
    assert keep.tolist() == list(range(200))
    step = 0.0 if method == "linear" else math.exp(-2)
    assert_close(lowered[:4], torch.tensor([0.5, 0.5 * step, 0.5 * step**2, 0.5 * step**3]))


def test_of_equal_scores_the_earlier_row_comes_first_across_labels() -> None:
    labels = torch.tensor([2, 0, 1, 0])
    keep, _ = SoftNMS()(BOXES, torch.full((4,), 0.5), labels)
    assert keep.tolist() == [0, 1, 2, 3]


def test_labels_apart_and_class_agnostic() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    keep, scores = SoftNMS()(BOXES, SCORES, labels)
    assert keep.tolist() == [0, 1, 3, 2]
    assert_close(scores, SCORES[keep], rtol=0, atol=0)
    agnostic = SoftNMS(class_agnostic=True)(BOXES, SCORES, labels)
    one = SoftNMS()(BOXES, SCORES, LABELS)
    assert_close(agnostic, one, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_come_back_in_the_precision_they_had(dtype: torch.dtype) -> None:
    keep, scores = SoftNMS()(BOXES.to(dtype), SCORES.to(dtype).requires_grad_(), LABELS)
    assert scores.dtype == dtype and keep.tolist() == [0, 3, 2, 1] and not scores.requires_grad


def test_boxes_without_area_are_left_alone() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    keep, scores = SoftNMS()(boxes, SCORES[:3], LABELS[:3])
    assert keep.tolist() == [0, 1, 2]
    assert_close(scores, SCORES[:3], rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_empty_input(method: str) -> None:
    keep, scores = SoftNMS(method=method)(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert keep.shape == scores.shape == (0,) and keep.dtype == torch.int64 and scores.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    def with_bad(values: Tensor, index: tuple[int, ...]) -> Tensor:
        changed = values.clone()
        changed[index] = bad
        return changed

    with pytest.raises(ValueError, match=rf"SoftNMS: box 2 of 4 is \[0.0, {bad}, 10.0, 2.0\]"):
        SoftNMS()(with_bad(BOXES, (2, 1)), SCORES, LABELS)
    with pytest.raises(ValueError, match=f"SoftNMS: score 3 of 4 is {bad}"):
        SoftNMS()(BOXES, with_bad(SCORES, (3,)), LABELS)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("method", "hard", "method is 'hard'; choose one of linear, gaussian"),
        ("sigma", 0.0, "sigma is 0.0; it must be above 0"),
        ("sigma", math.nan, "sigma is nan; it must be above 0"),
        ("threshold", 1.5, "threshold is 1.5; an IoU lies in [0, 1]"),
        ("score_threshold", -0.1, "score_threshold is -0.1; a score is at least 0"),
    ],
)
def test_arguments_outside_their_range(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SoftNMS(**{argument: value})


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_as_on_the_host(method: str) -> None:
    scene = drawn(500, 20, 4)
    keep, scores = SoftNMS(method=method)(*(tensor.cuda() for tensor in scene))
    assert keep.is_cuda and scores.is_cuda
    assert_close((keep.cpu(), scores.cpu()), SoftNMS(method=method)(*scene), rtol=0, atol=0)
