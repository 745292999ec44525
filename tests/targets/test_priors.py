from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.targets.lattice import Lattice, build_lattice
from detseg.targets.priors import GridCoder, PriorAssigner, PriorGrid, covering, prior_strides

SIZES = [[[6.0, 8], [12, 10]], [[30, 20], [24, 50]]]
GRID = PriorGrid(sizes=SIZES)


def lattice(height: int = 64, width: int = 96, grid: PriorGrid = GRID, strides: tuple[int, ...] = (8, 16)) -> Lattice:
    cells = tuple((-(-height // stride), -(-width // stride)) for stride in strides)
    return build_lattice(grid, cells, tuple((height // rows, width // columns) for rows, columns in cells), "cpu")


def random_boxes(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand((count, 2), generator=generator) * torch.tensor([90.0, 60.0])
    return torch.cat([low, low + torch.rand((count, 2), generator=generator) * 40 + 0.5], dim=1)


def slow_assign(boxes: Tensor, image: Tensor, batch: int, ignore: float | None) -> Tensor:
    """One object after the other: the best shape of all, the cell of its centre, the larger of two."""
    priors = lattice().boxes
    found = torch.full((batch, len(priors)), -1)
    if ignore is not None and len(boxes):
        for one in range(batch):
            own = boxes[image == one]
            if len(own):
                found[one, box_iou(priors, own).amax(dim=1) >= ignore] = -2
    shapes = [(level, a, *pair) for level, pairs in enumerate(SIZES) for a, pair in enumerate(pairs)]
    owners: dict[tuple[int, int], int] = {}
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        overlaps = []
        for _, _, w, h in shapes:
            inter = min(w, x1 - x0) * min(h, y1 - y0)
            overlaps.append(inter / (w * h + (x1 - x0) * (y1 - y0) - inter))
        level, a, _, _ = shapes[overlaps.index(max(overlaps))]
        stride, rows, columns = [(8, 8, 12), (16, 4, 6)][level]
        row, column = min(int((y0 + y1) / 2 // stride), rows - 1), min(int((x0 + x1) / 2 // stride), columns - 1)
        key = int(image[index]), [0, 192][level] + (row * columns + column) * 2 + a
        if key in owners:
            left, top, right, bottom = boxes[owners[key]].tolist()
            if (x1 - x0) * (y1 - y0) <= (right - left) * (bottom - top):
                continue
        owners[key] = index
    for (one, prior), index in owners.items():
        found[one, prior] = index
    return found


def test_priors_stand_at_the_middle_of_their_cells() -> None:
    boxes = lattice().boxes
    assert len(boxes) == 2 * (8 * 12 + 4 * 6) and lattice().counts == [192, 48]
    assert boxes[0].tolist() == [1, 0, 7, 8] and boxes[3].tolist() == [6, -1, 18, 9]
    assert boxes[192 + 2 * (6 + 2)].tolist() == [40 - 15, 24 - 10, 40 + 15, 24 + 10]  # row 1, column 2
    strides = prior_strides(lattice())
    assert strides[:192].unique().tolist() == [8] and strides[192:].unique().tolist() == [16]


@pytest.mark.parametrize("ignore", [None, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_assignment_equals_one_object_after_the_other(ignore: float | None, seed: int) -> None:
    boxes = random_boxes(60, seed)
    image = torch.randint(0, 3, (60,)).sort().values
    found = PriorAssigner(ignore=ignore)(boxes, image, 4, lattice())
    assert torch.equal(found, slow_assign(boxes, image, 4, ignore))
    assert int((found >= 0).sum()) > 40 and (ignore is None) == (not bool((found == -2).any()))


def test_every_object_has_one_prior_unless_a_larger_one_wants_the_same() -> None:
    boxes = torch.tensor([[2.0, 2, 7, 7], [1, 1, 7, 7], [50, 10, 80, 30], [0, 0, 0.1, 0.2]])
    found = PriorAssigner(ignore=None)(boxes, torch.zeros(4, dtype=torch.int64), 1, lattice())
    owners = sorted(found[found >= 0].tolist())
    assert owners == [1, 2]  # of three in the first cell the largest
    assert found[0, 0] == 1  # row 0, column 0, the first shape


def test_no_objects_and_two_thousand() -> None:
    none = PriorAssigner(ignore=0.5)(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, lattice())
    assert none.shape == (2, 240) and bool((none == -1).all())
    many = random_boxes(2000)
    found = PriorAssigner(ignore=0.5)(many, torch.zeros(2000, dtype=torch.int64), 1, lattice())
    positive = found[found >= 0]
    assert len(positive) == len(positive.unique()) <= 240


def test_coder_by_hand() -> None:
    """A cell of 8 pixels with its middle at (12, 4); a box whose centre lies a quarter into it."""
    prior, stride = torch.tensor([[9.0, 0, 15, 8]]), torch.tensor([[8, 8]])
    box = torch.tensor([[8.0, -1, 12, 5]])  # centre (10, 2), sides 4 and 6
    wanted = torch.tensor([[0.25, 0.25, 4 / 6, 6 / 8]])
    wanted[:, 2:] = wanted[:, 2:].log()
    assert_close(GridCoder().offsets(box, prior, stride), wanted)
    assert_close(GridCoder().decode(torch.zeros(1, 4), prior, stride), prior)
    assert_close(GridCoder().encode(box, prior, stride)[0, 0], torch.tensor(0.25).logit())


def test_decode_inverts_encode() -> None:
    boxes, own = random_boxes(400), lattice()
    boxes = boxes[((boxes[:, :2] + boxes[:, 2:]) / 2 < torch.tensor([96.0, 64.0])).all(dim=1)]  # centres in the image
    matched = PriorAssigner(ignore=None)(boxes, torch.zeros(len(boxes), dtype=torch.int64), 1, own)[0]
    rows = (matched >= 0).nonzero()[:, 0]
    assert len(rows) > 80
    priors, stride = own.boxes[rows], prior_strides(own)[rows]
    numbers = GridCoder().encode(boxes[matched[rows]], priors, stride)
    assert bool(numbers.isfinite().all())
    assert_close(GridCoder().decode(numbers, priors, stride), boxes[matched[rows]], rtol=0, atol=2e-3)


def test_centres_on_borders_and_boxes_without_area_have_finite_targets() -> None:
    prior, stride = torch.tensor([[9.0, 0, 15, 8]]).expand(3, 4), torch.tensor([[8, 8]]).expand(3, 2)
    boxes = torch.tensor([[8.0, 0, 8, 0], [16, 8, 16, 9], [-500, 0, -400, 2]])
    numbers = GridCoder().encode(boxes, prior, stride)
    assert bool(numbers.isfinite().all()) and float(numbers[:, :2].abs().max()) < 9.3
    assert bool(GridCoder().decode(torch.full((3, 4), 1e4), prior, stride).isfinite().all())


def test_a_predicted_box_never_leaves_its_cell() -> None:
    own = lattice()
    boxes = GridCoder().decode(torch.randn(240, 4) * 5, own.boxes, prior_strides(own))
    cell = (own.boxes[:, :2] + own.boxes[:, 2:]) / 2
    assert bool((((boxes[:, :2] + boxes[:, 2:]) / 2 - cell).abs() <= prior_strides(own) / 2 + 1e-2).all())


@pytest.mark.parametrize("least", [0.0, 0.3, 0.6, 0.9])
def test_what_covers_an_object_is_what_torchvisions_iou_says(least: float) -> None:
    own, generator = lattice(), torch.Generator().manual_seed(3)
    numbers = torch.randn(3, own.total, 4, generator=generator) * torch.tensor([4.0, 4, 0.7, 0.7])
    predicted = GridCoder().decode(numbers, own.boxes, prior_strides(own))
    near = predicted[0, ::7] + torch.rand(35, 4, generator=generator) * 0.1
    objects = torch.cat([near, random_boxes(300, 9), torch.tensor([[0.0, 0, 1e30, 2]])])
    image = torch.cat([torch.zeros(35, dtype=torch.int64), torch.randint(0, 2, (301,), generator=generator)])
    found = covering(predicted, objects, image, own, least)
    for one in range(2):
        assert torch.equal(found[one], (box_iou(predicted[one], objects[image == one]) > least).any(dim=1))
    assert bool(found.any()) and not bool(found[2].any())  # no objects
    assert not bool(covering(predicted, objects[:0], image[:0], own, least).any())


@pytest.mark.parametrize("sizes", [[[]], [[[3, 0]]], [[[3, 4, 5]]], [[[3, 4]], [[-1, 2]]]])
def test_sizes_that_are_none_are_named(sizes: list[list[list[float]]]) -> None:
    with pytest.raises(ValueError, match=r"PriorGrid: level \d has sizes"):
        PriorGrid(sizes=sizes)


def test_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="2 levels, but the features have 1"):
        GRID([(4, 4)], [(8, 8)], "cpu")
