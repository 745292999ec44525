"""The sequence itself, for factors that no NMS has; Soft-NMS and adaptive NMS test the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detseg.ops import suppress as module
from detseg.ops.suppress import Floats, Ints, suppress
from nms_twins import Scene, iou, scenes


def by_row(row: Ints, overlap: Floats) -> Floats:
    """Lower by what depends on the box that was taken: even rows halve, odd ones take all that overlap by a third."""
    return np.where(row % 2 == 0, np.where(overlap > 0, 0.5, 1.0), np.where(overlap > 1 / 3, 0.0, 1.0))


def twin(boxes: Tensor, scores: Tensor, labels: Tensor, floor: float) -> tuple[list[int], list[float]]:
    box, score, label = boxes.tolist(), scores.tolist(), labels.tolist()
    left, taken, reached = [row for row in range(len(box)) if score[row] >= floor], [], []
    while left:
        top = min(left, key=lambda row: (-score[row], row))
        left.remove(top)
        taken.append(top)
        reached.append(score[top])
        for row in left:
            if label[row] == label[top]:
                overlap = iou(box[top], box[row])
                score[row] *= (0.5 if overlap > 0 else 1.0) if top % 2 == 0 else (0.0 if overlap > 1 / 3 else 1.0)
        left = [row for row in left if score[row] >= floor]
    return taken, reached


@given(scenes(), st.sampled_from([0.0, 0.01, 0.5]), st.sampled_from([1, 2, 48]))
def test_equals_its_twin_to_the_bit(scene: Scene, floor: float, candidates: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CANDIDATES", candidates)
        rows, reached = suppress(*scene, by_row, floor=floor)
    assert (rows.tolist(), reached.tolist()) == twin(*scene, floor)


def test_memory_bounds_the_candidates_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = torch.rand(300, 2) * 50
    scene = torch.cat([corner, corner + torch.rand(300, 2) * 30], dim=1), torch.rand(300), torch.randint(0, 3, (300,))
    whole = suppress(*scene, by_row, floor=0.001)
    monkeypatch.setattr(module, "_PAIRS", 10)
    sizes, best = [], module._best
    monkeypatch.setattr(module, "_best", lambda scores: sizes.append(len(best(scores))) or best(scores))
    narrow = suppress(*scene, by_row, floor=0.001)
    assert sizes[0] == 1 and len(sizes) > 20
    assert torch.equal(narrow[0], whole[0]) and torch.equal(narrow[1], whole[1])


def test_what_was_given_stays_as_it_was() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]], dtype=torch.float64)
    scores, labels = torch.tensor([0.5, 0.6], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    suppress(boxes, scores, labels, by_row, floor=0.0)
    assert scores.tolist() == [0.5, 0.6] and boxes[1].tolist() == [0, 0, 10, 9]
