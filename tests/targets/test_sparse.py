from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from assignment_oracle import ANCHORS, KINDS, dense_anchors, flatten, lattice_of, per_image, random_boxes
from detseg.targets.matchers import IoUMatcher
from detseg.targets.sparse import SparseIoUMatcher, paired_iou


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_anchor_gets_the_box_that_torchvision_gives_it(kind: str, low_quality: bool) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    found = torch.zeros(2, dtype=torch.int64)
    for size in [(128, 128), (160, 96), (64, 320)]:
        lattice = lattice_of(ANCHORS, *size)
        for _ in range(10):
            counts = torch.randint(0, 25, (3,), generator=generator).tolist()  # some images stay empty
            boxes = [random_boxes(kind, count, *size, generator) for count in counts]
            matcher = SparseIoUMatcher(positive=0.5, negative=0.4, allow_low_quality=low_quality)
            matched = per_image(matcher(*flatten(boxes), 3, lattice), boxes)
            assert_close(matched, dense_anchors(boxes, lattice, low_quality=low_quality), rtol=0, atol=0)
            found += torch.stack(((matched >= 0).sum(), (matched == -2).sum()))
    if low_quality or kind != "tiny":
        assert int(found[0]) > 100
    if kind != "tiny":
        assert int(found[1]) > 100


def test_equal_thresholds_leave_nothing_ignored() -> None:
    generator = torch.Generator().manual_seed(0)
    lattice = lattice_of(ANCHORS, 128, 128)
    boxes = random_boxes("any", 30, 128, 128, generator)
    matched = SparseIoUMatcher(positive=0.3, negative=0.3)(
        boxes, torch.zeros(len(boxes), dtype=torch.int64), 1, lattice
    )
    dense = IoUMatcher(positive=0.3, negative=0.3, allow_low_quality=True)(box_iou(boxes, lattice.boxes))
    assert_close(matched[0], dense, rtol=0, atol=0)
    assert not bool((matched == -2).any())


def test_a_box_that_no_anchor_touches_makes_none_positive() -> None:
    lattice = lattice_of(ANCHORS, 64, 64)
    boxes = torch.tensor([[5000.0, 5000, 5010, 5010], [10, 10, 40, 40]])
    matched = SparseIoUMatcher()(boxes, torch.tensor([0, 1]), 2, lattice)
    assert bool((matched[0] == -1).all()) and int((matched[1] == 1).sum()) > 0


def test_an_empty_batch_is_all_background() -> None:
    lattice = lattice_of(ANCHORS, 64, 64)
    matched = SparseIoUMatcher()(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, lattice)
    assert matched.shape == (2, lattice.total) and bool((matched == -1).all())


def test_paired_iou_is_the_diagonal_of_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (random_boxes("inside", 50, 100, 100, generator)[:30] for _ in range(2))
    assert_close(paired_iou(first, second), box_iou(first, second).diagonal(), rtol=0, atol=0)


def test_thresholds_out_of_order_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"negative is 0\.6 and positive 0\.5"):
        SparseIoUMatcher(positive=0.5, negative=0.6)
