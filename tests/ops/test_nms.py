from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import batched_nms, nms

from detseg.ops.nms import BatchedNMS, suppress_per_image
from nms_twins import greedy, scenes

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
ONE = torch.zeros(3, dtype=torch.int64)


def drawn(count: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    corner = torch.rand(count, 2) * 300
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * 60 + 1], dim=1)
    return boxes, torch.rand(count), torch.randint(0, classes, (count,))


def test_by_hand_and_sorted_by_score() -> None:
    suppression = BatchedNMS(threshold=0.5)
    scores = torch.tensor([0.5, 0.6, 0.9])
    keep, kept = suppression(BOXES, scores, ONE)
    assert keep.tolist() == [2, 1]
    assert_close(kept, torch.tensor([0.9, 0.6]), rtol=0, atol=0)
    keep, kept = suppression(BOXES, scores, torch.tensor([0, 1, 0]))
    assert keep.tolist() == [2, 1, 0]
    assert_close(kept, torch.tensor([0.9, 0.6, 0.5]), rtol=0, atol=0)


def test_an_iou_at_the_threshold_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU 0.5 in any precision
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert BatchedNMS(threshold=0.5)(boxes, scores, labels)[0].tolist() == [0, 1]
    assert BatchedNMS(threshold=0.499)(boxes, scores, labels)[0].tolist() == [0]


@pytest.mark.parametrize("count, classes", [(200, 5), (3000, 5), (3000, 1), (1, 1)])
def test_equals_torchvision(count: int, classes: int) -> None:
    boxes, scores, labels = drawn(count, classes)
    keep, kept = BatchedNMS(threshold=0.4)(boxes, scores, labels)
    assert 0 < len(keep) < max(count, 2)
    assert_close(keep, batched_nms(boxes, scores, labels, 0.4))
    assert_close(kept, scores[keep], rtol=0, atol=0)


@given(scenes(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_equals_its_twin(scene: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
    keep, kept = BatchedNMS(threshold=threshold)(*scene)
    assert keep.tolist() == greedy(*scene, [threshold] * len(scene[0]))
    assert_close(kept, scene[1][keep], rtol=0, atol=0)


@given(scenes(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_class_agnostic_is_one_class(scene: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
    boxes, scores, labels = scene
    keep, _ = BatchedNMS(threshold=threshold, class_agnostic=True)(boxes, scores, labels)
    assert keep.tolist() == greedy(boxes, scores, torch.zeros_like(labels), [threshold] * len(boxes))


def test_class_agnostic_equals_torchvision() -> None:
    boxes, scores, labels = drawn(2000, 4)
    keep, _ = BatchedNMS(threshold=0.4, class_agnostic=True)(boxes, scores, labels)
    assert_close(keep, nms(boxes, scores, 0.4))
    assert len(keep) < len(BatchedNMS(threshold=0.4)(boxes, scores, labels)[0])


@pytest.mark.parametrize("count", [6, 3000])  # torchvision goes another way for many boxes
def test_of_equal_scores_the_earlier_row_comes_first(count: int) -> None:
    left = torch.arange(count)[:, None] * 20.0
    boxes = torch.cat([left, torch.zeros_like(left), left + 10, torch.full_like(left, 10)], dim=1).repeat(2, 1)
    keep, _ = BatchedNMS(threshold=0.5)(boxes, torch.full((2 * count,), 0.5), torch.zeros(2 * count, dtype=torch.int64))
    assert keep.tolist() == list(range(count))


def test_half_precision_keeps_labels_apart() -> None:
    # Offsets of 1333 px a label pass what float16 holds.
    boxes = torch.tensor([[0.0, 0, 1333, 800], [0, 0, 1333, 800]]).half()
    keep, kept = BatchedNMS(threshold=0.5)(boxes, torch.tensor([0.9, 0.8]).half(), torch.tensor([0, 70]))
    assert keep.tolist() == [0, 1] and kept.dtype == torch.float16


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_empty_input(class_agnostic: bool) -> None:
    suppression = BatchedNMS(threshold=0.5, class_agnostic=class_agnostic)
    keep, kept = suppression(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert keep.shape == kept.shape == (0,) and keep.dtype == torch.int64 and kept.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    suppression, scores = BatchedNMS(threshold=0.5), torch.tensor([0.5, 0.6, 0.9])
    boxes = BOXES.clone()
    boxes[1, 2] = bad
    with pytest.raises(ValueError, match=rf"box 1 of 3 is \[0.0, 0.0, {bad}, 9.0\]; every number must be finite"):
        suppression(boxes, scores, ONE)
    scores[2] = bad
    with pytest.raises(ValueError, match=f"score 2 of 3 is {bad}; every number must be finite"):
        suppression(BOXES, scores, ONE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes \(3, 4\), scores \(2,\) and labels \(3,\) do not fit"):
        BatchedNMS(threshold=0.5)(BOXES, torch.ones(2), ONE)


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan")])
def test_threshold_outside_its_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold is {threshold}; an IoU lies in"):
        BatchedNMS(threshold=threshold)


def test_candidates_of_all_images_are_clipped_and_suppressed_image_by_image() -> None:
    boxes = torch.tensor([[-5.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 90, 4], [0, 6, 90, 9]])
    scores, labels = torch.tensor([0.5, 0.9, 0.8, 0.3, 0.4]), torch.tensor([1, 1, 1, 0, 0])
    image = torch.tensor([0, 0, 2, 2, 2])
    sizes = torch.tensor([[20, 20], [20, 20], [8, 30]])
    found = suppress_per_image(boxes, scores, labels, image, sizes, nms=BatchedNMS(threshold=0.5), most=2)
    assert [len(one) for one in found] == [1, 0, 2]
    assert found[0].boxes.tolist() == [[0, 0, 10, 9]]  # beats the clipped one
    assert found[2].boxes.tolist() == [[0, 0, 10, 8], [0, 6, 30, 8]]  # the two best of three that do not overlap
    assert_close(found[2].scores, torch.tensor([0.8, 0.4]))
