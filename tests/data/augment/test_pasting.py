from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.data.augment.pasting import choose, mask_boxes, paste
from detseg.structures import SemanticMap, Target


def scene(value: int, *rectangles: tuple[int, int, int, int], first: int = 0) -> tuple[torch.Tensor, Target]:
    """Return an image of 10 x 12 of one value, and objects of which label, area and flags tell which they are."""
    masks = torch.zeros((len(rectangles), 10, 12), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, rectangles, strict=True):
        mask[y1:y2, x1:x2] = True
    labels = torch.arange(first, first + len(rectangles))
    target = Target(
        boxes=torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4), labels=labels, masks=masks,
        area=(labels + 1) * 100.0, iscrowd=labels % 2 == 1, difficult=labels % 2 == 0, image_id=first, size=(10, 12),
    )  # fmt: skip
    return torch.full((3, 10, 12), value, dtype=torch.uint8), target


def test_what_is_pasted_hides_what_lies_below() -> None:
    below = scene(10, (0, 0, 4, 4), (6, 0, 10, 4), (1, 7, 3, 9), (0, 5, 12, 6))
    above = scene(200, (2, 0, 4, 4), (0, 6, 5, 10), first=20)
    before = below[0].clone()
    image, target = paste(below, above)
    assert target.labels.tolist() == [0, 1, 3, 20, 21]  # the third is hidden
    assert target.boxes.tolist() == [[0, 0, 2, 4], [6, 0, 10, 4], [0, 5, 12, 6], [2, 0, 4, 4], [0, 6, 5, 10]]
    assert target.area.tolist() == [50, 200, 400, 2100, 2200]  # of the first, half is left
    assert target.iscrowd.tolist() == [False, True, True, False, True]
    assert target.masks is not None and int(target.masks[0].sum()) == 8
    pasted = target.masks[3] | target.masks[4]
    assert_close(image[0], torch.where(pasted, 200, 10).to(torch.uint8))
    assert not (target.masks[:3].any(dim=0) & pasted).any() and target.image_id == 0
    assert_close(below[0], before)


def test_an_object_of_which_too_little_is_left_is_dropped() -> None:
    below, above = scene(0, (0, 0, 10, 10)), scene(9, (0, 0, 10, 9), first=5)
    assert paste(below, above, min_visible=0.2)[1].labels.tolist() == [5]
    assert paste(below, above, min_visible=0.1)[1].labels.tolist() == [0, 5]
    assert paste(below, above, min_visible=0.1, min_side=2)[1].labels.tolist() == [5]


def test_a_crowd_stays_as_long_as_a_pixel_of_it_shows() -> None:
    below, above = scene(0, (0, 0, 10, 10), first=1), scene(9, (0, 0, 10, 9), first=4)
    target = paste(below, above, min_visible=0.9)[1]
    assert target.labels.tolist() == [1, 4] and target.boxes[0].tolist() == [0, 9, 10, 10]


def test_empty_images_on_either_side() -> None:
    full, empty = scene(1, (0, 0, 4, 4)), scene(2)
    assert paste(full, empty) is full
    image, target = paste(empty, full)
    assert target.labels.tolist() == [0] and int((image[0] == 1).sum()) == 16


def test_objects_are_drawn_without_crowds_and_empty_masks() -> None:
    _, target = scene(0, (0, 0, 2, 2), (2, 2, 4, 4), (4, 4, 6, 6), (6, 6, 8, 8), (0, 0, 0, 0))
    assert choose(target, 1.0).tolist() == [True, False, True, False, False]
    assert choose(target, 0.0).tolist() == [False] * 5
    torch.manual_seed(0)
    drawn = torch.stack([choose(target, 0.3) for _ in range(400)]).float().mean(dim=0)
    assert_close(drawn[[0, 2]], torch.tensor([0.3, 0.3]), rtol=0, atol=0.07)


def test_proposals_of_pasted_objects_come_along() -> None:
    below, above = scene(0), scene(9, (2, 2, 8, 8), first=5)
    below[1].proposals = torch.tensor([[0.0, 0, 12, 10]])
    above[1].proposals = torch.tensor([[2.0, 2, 8, 7], [8, 0, 12, 10], [0, 0, 4, 4]])
    _, target = paste(below, above)
    assert target.proposals is not None and target.proposals.tolist() == [[0, 0, 12, 10], [2, 2, 8, 7]]


def test_what_has_no_masks_or_a_map_is_refused() -> None:
    below, above = scene(0, (0, 0, 4, 4)), scene(9, (2, 2, 8, 8), first=5)
    above[1].masks = None
    with pytest.raises(ValueError, match="copy-paste: image 0 or 5 has no masks"):
        paste(below, above)
    with pytest.raises(ValueError, match="copy-paste: image 5 has no masks"):
        choose(above[1], 0.5)
    below[1].semantic = SemanticMap(torch.zeros((10, 12), dtype=torch.int64))
    with pytest.raises(ValueError, match="copy-paste: image 0 has a map of classes"):
        paste(below, scene(9, (2, 2, 8, 8)))


def test_boxes_of_masks() -> None:
    masks = torch.zeros((2, 5, 6), dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5]]
    assert mask_boxes(masks[:0]).shape == (0, 4)
