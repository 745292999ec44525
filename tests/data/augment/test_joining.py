from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detseg.data.augment.joining import joined, joined_panoptic, joined_semantic, moved
from detseg.structures import PanopticMap, SemanticMap, Target


def target(label: int = 3, masks: bool = True) -> Target:
    painted = torch.zeros((1, 4, 6), dtype=torch.bool)
    painted[0, 1:3, 2:5] = True
    return Target(
        boxes=torch.tensor([[2.0, 1, 5, 3]]), labels=torch.tensor([label]), masks=painted if masks else None,
        iscrowd=torch.tensor([label % 2 == 1]), area=torch.tensor([label * 10.0]),
        difficult=torch.tensor([label % 2 == 0]), image_id=label, size=(4, 6), file=f"{label}.png",
        proposals=torch.tensor([[0.0, 0, 6, 4], [1, 1, 2, 2]]), semantic=SemanticMap(torch.zeros((4, 6)).long()),
    )  # fmt: skip


def test_objects_masks_and_proposals_move_together() -> None:
    seen = moved(target(), (3, 2), (9, 10))
    assert seen.boxes.tolist() == [[4, 4, 7, 6]] and seen.size == (9, 10)
    assert seen.proposals is not None and seen.proposals.tolist() == [[2, 3, 8, 7], [3, 4, 4, 5]]
    expected = torch.zeros((1, 9, 10), dtype=torch.bool)
    expected[0, 4:6, 4:7] = True
    assert seen.masks is not None
    assert_close(seen.masks, expected)
    assert seen.semantic is None and seen.labels.tolist() == [3] and seen.area.tolist() == [30]


def test_rows_are_joined_and_the_first_gives_the_name() -> None:
    together = joined([target(3), target(4), replace(target(7)[:0], proposals=torch.zeros((0, 4)))])
    assert together.labels.tolist() == [3, 4] and together.iscrowd.tolist() == [True, False]
    assert together.difficult.tolist() == [False, True] and together.area.tolist() == [30, 40]
    assert together.masks is not None and together.masks.shape == (2, 4, 6)
    assert together.proposals is not None and together.proposals.shape == (4, 4)
    assert (together.image_id, together.file) == (3, "3.png") and together.semantic is not None
    plain = replace(target(3, masks=False), proposals=None)
    assert joined([plain, plain]).masks is None and joined([plain, plain]).proposals is None
    with pytest.raises(ValueError, match=r"1 of 2 images to be joined have masks.*3.png, 4.png"):
        joined([target(3), target(4, masks=False)])


def test_semantic_maps_lie_side_by_side_and_the_rest_is_ignored() -> None:
    maps = [SemanticMap(torch.tensor([[1, 2]])), SemanticMap(torch.tensor([[7, 4], [5, 6]]), ignore_index=7)]
    whole = joined_semantic(maps, [(0, 0), (1, 1)], (3, 4))
    assert whole.labels.tolist() == [[1, 2, 255, 255], [255, 255, 4, 255], [255, 5, 6, 255]]


def test_panoptic_segments_are_counted_through() -> None:
    first = PanopticMap(torch.tensor([[1, 2], [0, 2]]), torch.tensor([5, 6]), torch.tensor([True, False]))
    second = PanopticMap(torch.tensor([[0, 1], [1, 1]]), torch.tensor([9]), torch.tensor([True]))
    whole = joined_panoptic([first, second], [(0, 0), (0, 2)], (2, 5))
    assert whole.segments.tolist() == [[1, 2, 0, 3, 0], [0, 2, 3, 3, 0]]
    assert whole.labels.tolist() == [5, 6, 9] and whole.is_thing.tolist() == [True, False, True]
