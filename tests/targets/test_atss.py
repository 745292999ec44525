from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from assignment_oracle import ANCHORS, KINDS, POINTS, flatten, lattice_of, per_image, random_boxes
from detseg.targets.atss import ATSSAssigner
from detseg.targets.lattice import Lattice


def _twin(boxes: Tensor, lattice: Lattice, *, k: int, scale: float) -> Tensor:
    """Algorithm 1, line by line, for the boxes (G, 4) of one image; returns (N,)."""
    centre = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2
    half = (lattice.boxes[:, 2:] - lattice.boxes[:, :2]) / 2 * scale
    iou = box_iou(boxes, torch.cat((centre - half, centre + half), 1))  # (G, N)
    best, matched = torch.zeros(lattice.total), torch.full((lattice.total,), -1)
    per_cell = lattice.shapes.step.tolist()[0]
    for row, box in enumerate(boxes):
        away = (centre - (box[:2] + box[2:]) / 2).square().sum(1)  # (N,)
        candidates: list[int] = []
        start = 0
        for count in lattice.counts:
            cells = sorted(range(0, count, per_cell), key=lambda i: (float(away[start + i]), i))[:k]
            candidates += [start + cell + inner for cell in cells for inner in range(per_cell)]
            start += count
        own = iou[row, candidates].double()
        threshold = own.mean() + (own.std() if len(own) > 1 else 0.0)
        for index, value in zip(candidates, own, strict=True):
            x, y = centre[index].tolist()
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if inside and value >= threshold and value > best[index]:
                best[index], matched[index] = iou[row, index], row
    return matched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("references", "scale"), [(POINTS, 8.0), (ANCHORS, 1.0)], ids=["points", "anchors"])
def test_every_reference_gets_the_box_of_algorithm_1(references: object, scale: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    positives = 0
    for size in [(96, 128), (64, 160)]:
        lattice = lattice_of(references, *size)  # type: ignore[arg-type]
        for k in (9, 4):
            boxes = [random_boxes(kind, count, *size, generator) for count in (6, 0, 9)]
            matched = per_image(ATSSAssigner(k=k, scale=scale)(*flatten(boxes), 3, lattice), boxes)
            for row, own in enumerate(boxes):
                assert_close(matched[row], _twin(own, lattice, k=k, scale=scale), rtol=0, atol=0)
            positives += int((matched >= 0).sum())
    assert positives > 10 or kind == "tiny"


def test_by_hand() -> None:
    """A box of 32 pixels about the point (32, 32), and squares of 32 pixels about the points of stride 8."""
    lattice = lattice_of(POINTS, 64, 64)
    box, zero = torch.tensor([[16.0, 16, 48, 48]]), torch.zeros(1, dtype=torch.int64)
    first = (ATSSAssigner(k=9, scale=4.0)(box, zero, 1, lattice)[0] >= 0).nonzero()[:, 0]
    # IoU 1 there, 24 / 40 beside it and 9 / 23 at the corners; the squares of coarse levels have 1 / 4 and less.
    assert first.tolist() == [3 * 8 + 4, 4 * 8 + 3, 4 * 8 + 4, 4 * 8 + 5, 5 * 8 + 4]
    # Of two equal boxes the first wins.
    both = ATSSAssigner(k=9, scale=4.0)(box.repeat(2, 1), zero.repeat(2), 1, lattice)
    assert_close(both, ATSSAssigner(k=9, scale=4.0)(box, zero, 1, lattice))


def test_smaller_than_a_stride_none_and_far_outside() -> None:
    lattice = lattice_of(POINTS, 64, 64)
    assign = ATSSAssigner(scale=8.0)
    none = assign(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, lattice)
    assert none.shape == (2, lattice.total) and bool((none == -1).all())
    # Between the points (8, 8) and (16, 16): no centre inside. About (16, 16): that point alone is inside.
    boxes = torch.tensor([[10.0, 10, 14, 14], [14.0, 14, 18, 18], [5e6, 5e6, 6e6, 6e6], [-9.0, -9, -3, -3]])
    matched = assign(boxes, torch.arange(4), 4, lattice)
    assert [int((row >= 0).sum()) for row in matched] == [0, 1, 0, 0]
    assert int(matched[1, 2 * 8 + 2]) == 1


def test_two_thousand_boxes_are_those_of_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    lattice = lattice_of(POINTS, 320, 320)
    boxes = random_boxes("inside", 2000, 320, 320, generator)
    assign, image = ATSSAssigner(scale=8.0), torch.zeros(len(boxes), dtype=torch.int64)
    matched = assign(boxes, image, 1, lattice)[0]
    assert int((matched >= 0).sum()) > 500
    claimed = torch.zeros(lattice.total, dtype=torch.bool)
    for row in range(0, len(boxes), 20):  # who is claimed alone is claimed among all
        claimed |= assign(boxes[row : row + 1], image[:1], 1, lattice)[0] >= 0
    assert bool((matched[claimed] >= 0).all())


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k is 0 and scale 1\.0"):
        ATSSAssigner(k=0)
    with pytest.raises(ValueError, match=r"k is 9 and scale -1"):
        ATSSAssigner(scale=-1)
