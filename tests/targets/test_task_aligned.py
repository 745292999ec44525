from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from assignment_oracle import ANCHORS, KINDS, POINTS, flatten, lattice_of, random_boxes
from detseg.targets import task_aligned
from detseg.targets.lattice import Lattice, build_lattice
from detseg.targets.points import CellGrid
from detseg.targets.task_aligned import Predictions, TaskAlignedAssigner


def _predictions(batch: int, lattice: Lattice, generator: torch.Generator, classes: int = 3) -> Predictions:
    """Random scores, and boxes of random sizes about every reference's centre."""
    centre = ((lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2).repeat(batch, 1)
    sides = 4 + torch.rand(len(centre), 4, generator=generator) * 40
    boxes = torch.cat((centre - sides[:, :2], centre + sides[:, 2:]), 1)
    logits = torch.randn(len(centre), classes, generator=generator)
    return Predictions(logits, lambda rows: boxes[rows])


def _twin(
    boxes: Tensor, classes: Tensor, lattice: Lattice, logits: Tensor, predicted: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """TOOD's assignment of one image, object by object and reference by reference; returns (N,) and (N,)."""
    centre = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2
    iou = box_iou(boxes, predicted)  # (G, N)
    claims: dict[int, list[tuple[float, int, float]]] = {}
    for row, box in enumerate(boxes):
        found = []
        for index, (x, y) in enumerate(centre.tolist()):
            if box[0] < x < box[2] and box[1] < y < box[3]:
                u, s = iou[row, index], logits[index, classes[row]].sigmoid()
                found.append((-float(s**0.5 * u**6), index, float(u)))
        for t, index, u in sorted(found)[:top_k]:
            if t < 0:
                claims.setdefault(index, []).append((-u, row, -t))
    matched, own = torch.full((lattice.total,), -1), [(0.0, 0.0)] * lattice.total
    for index, rivals in claims.items():
        u, matched[index], t = min(rivals)
        own[index] = (t, -u)
    quality = torch.zeros(lattice.total)
    for row in range(len(boxes)):
        rows = (matched == row).nonzero()[:, 0].tolist()
        for index in rows:
            quality[index] = own[index][0] / max(own[i][0] for i in rows) * max(own[i][1] for i in rows)
    return matched, quality


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", [CellGrid(), POINTS, ANCHORS], ids=["cells", "points", "anchors"])
def test_every_reference_learns_what_the_slow_twin_says(references: object, kind: str) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    positives = 0
    for size in [(64, 96), (48, 64)]:
        lattice = lattice_of(references, *size)  # type: ignore[arg-type]
        boxes = [random_boxes(kind, count, *size, generator) for count in (5, 0, 12)]
        flat, image = flatten(boxes)
        classes = torch.randint(0, 3, (len(flat),), generator=generator)
        seen = _predictions(3, lattice, generator)
        matched, quality = TaskAlignedAssigner(top_k=5).align(flat, classes, image, 3, lattice, seen)
        for index in range(3):
            mine = (image == index).nonzero()[:, 0]
            rows = torch.arange(lattice.total) + index * lattice.total
            wanted = _twin(flat[mine], classes[mine], lattice, seen.logits[rows], seen.boxes(rows), top_k=5)
            shift = int(mine[0]) if len(mine) else 0
            assert_close(torch.where(matched[index] >= 0, matched[index] - shift, -1), wanted[0], rtol=0, atol=0)
            assert_close(quality[index], wanted[1], rtol=1e-4, atol=1e-7)
        positives += int((matched >= 0).sum())
    assert positives > 10 or kind == "tiny"


def _grid(size: int = 32) -> Lattice:
    return build_lattice(CellGrid(), ((size // 8, size // 8),), ((8, 8),), "cpu")


def test_by_hand() -> None:
    lattice = _grid()  # centres at 4, 12, 20, 28
    predicted = lattice.boxes.clone()
    predicted[5] = torch.tensor([8.0, 8, 24, 24])  # IoU 1 with the first object
    predicted[6] = torch.tensor([8.0, 8, 24, 16])  # IoU 1/2
    logits = torch.zeros(16, 2)  # all score 1/2
    boxes, classes = torch.tensor([[8.0, 8, 24, 24], [9.0, 9, 11, 11]]), torch.tensor([1, 0])
    seen = Predictions(logits, lambda rows: predicted[rows])
    matched, quality = TaskAlignedAssigner(top_k=2).align(boxes, classes, torch.zeros(2).long(), 1, lattice, seen)
    assert matched[0].tolist() == [-1] * 5 + [0, 0] + [-1] * 9  # no centre lies in the second
    assert_close(quality[0, 5:7], torch.tensor([1.0, 0.5**6]))
    # With the third best (1/4 each of two cells) the earlier cell comes first.
    matched, _ = TaskAlignedAssigner(top_k=3).align(boxes, classes, torch.zeros(2).long(), 1, lattice, seen)
    assert (matched[0] >= 0).nonzero()[:, 0].tolist() == [5, 6, 9]


def test_a_cell_of_two_objects_goes_to_the_one_that_its_box_overlaps_more() -> None:
    lattice = _grid()
    boxes, classes = torch.tensor([[0.0, 0, 32, 32], [8.0, 8, 16, 16]]), torch.tensor([0, 1])
    logits = torch.zeros(16, 2)
    logits[:, 0] = 4.0  # the class of the first is surer everywhere
    seen = Predictions(logits, lambda rows: lattice.boxes[rows])
    matched, quality = TaskAlignedAssigner().align(boxes, classes, torch.zeros(2).long(), 1, lattice, seen)
    assert int(matched[0, 5]) == 1 and float(quality[0, 5]) == 1.0
    assert int((matched[0] == 0).sum()) == 9  # its ten best are the first ten cells


@pytest.mark.parametrize("most", [1, 700, 1 << 20])
def test_two_thousand_objects_in_parts_of_any_size(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lattice = lattice_of(CellGrid(), 256, 256)  # type: ignore[arg-type]
    count = 2000 if most > 1 else 200
    boxes = random_boxes("inside", count, 256, 256, generator)
    classes, image = torch.randint(0, 3, (len(boxes),)), torch.zeros(len(boxes), dtype=torch.int64)
    seen = _predictions(1, lattice, generator)
    whole = TaskAlignedAssigner().align(boxes, classes, image, 1, lattice, seen)
    monkeypatch.setattr(task_aligned, "MOST_CANDIDATES", most)
    parts = TaskAlignedAssigner().align(boxes, classes, image, 1, lattice, seen)
    assert_close(parts, whole, rtol=1e-5, atol=1e-8)  # vectorised powers round the ends of an array differently
    assert int((whole[0] >= 0).sum()) > 100


def test_nothing_to_learn_and_predictions_that_are_not_numbers() -> None:
    lattice = _grid()
    none = torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long()
    bad = Predictions(torch.full((32, 2), torch.nan), lambda rows: torch.full((len(rows), 4), torch.nan))
    for boxes, classes, image in (
        none,
        (torch.tensor([[0.0, 0, 32, 32]]), torch.zeros(1).long(), torch.ones(1).long()),
    ):
        matched, quality = TaskAlignedAssigner().align(boxes, classes, image, 2, lattice, bad)
        assert matched.shape == quality.shape == (2, 16)
        assert bool((matched == -1).all()) and bool((quality == 0).all())


@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_largest_of_each_owner_among_equals_the_first(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    owner = torch.randint(0, 9, (300,), generator=generator)
    owner = owner[owner != 4].sort().values  # one of the nine has none
    values = torch.randint(0, 12, (len(owner),), generator=generator) / 8  # many equals
    wanted = []
    for row in range(9):
        mine = (owner == row).nonzero()[:, 0].tolist()
        wanted += sorted(mine, key=lambda index: (-float(values[index]), index))[:count]
    assert task_aligned._top(owner, values, 9, count).tolist() == wanted
    assert len(wanted) == 8 * count


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k is 0, alpha 0\.5 and beta 6\.0"):
        TaskAlignedAssigner(top_k=0)
