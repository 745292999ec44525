from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.structures import Target
from detseg.targets.heatmaps import (
    CellObjects,
    GaussianHeatmaps,
    cells_of,
    crowd_cells,
    draw_gaussians,
    objects_in_cells,
    overlap_radius,
    own_cells,
)


def _target(boxes: list[list[float]], labels: list[int] | None = None, crowd: list[bool] | None = None) -> Target:
    return Target(
        boxes=torch.tensor(boxes).view(-1, 4).float(),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        iscrowd=torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
    )


def _loop(cells: Tensor, radius: Tensor, plane: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Every object and every cell in turn."""
    heat = torch.zeros(shape, dtype=radius.dtype)
    for (col, row), size, which in zip(cells.tolist(), radius.tolist(), plane.tolist(), strict=True):
        reach = math.floor(size)
        sigma = (2 * reach + 1) / 6
        for y, x in itertools.product(range(shape[1]), range(shape[2])):
            if abs(y - row) <= reach and abs(x - col) <= reach:
                value = math.exp(-((y - row) ** 2 + (x - col) ** 2) / (2 * sigma**2))
                heat[which, y, x] = max(float(heat[which, y, x]), value)
    return heat


@pytest.mark.parametrize("count", [0, 1, 40])
def test_heatmaps_equal_a_loop_over_objects_and_cells(count: int) -> None:
    shape = (4, 11, 17)
    cells = torch.stack((torch.randint(0, 17, (count,)), torch.randint(0, 11, (count,))), dim=1)
    radius = torch.rand(count, dtype=torch.float64) ** 3 * 9
    plane = torch.randint(0, 4, (count,))
    found = draw_gaussians(cells, radius, plane, shape)
    assert_close(found, _loop(cells, radius, plane, shape), rtol=1e-12, atol=0)
    assert bool((found[plane, cells[:, 1], cells[:, 0]] == 1).all())
    assert int((found == 1).sum()) == len(set(zip(plane.tolist(), map(tuple, cells.tolist()), strict=True)))


def test_a_gaussian_by_hand_and_the_larger_of_two() -> None:
    # radius 1: sigma is 3 / 6, so a neighbour has exp(-1 / (2 / 4)) = exp(-2), a diagonal one exp(-4)
    heat = draw_gaussians(torch.tensor([[1, 1], [3, 1]]), torch.tensor([1.9, 1.0]), torch.tensor([0, 0]), (2, 3, 5))
    side, corner = math.exp(-2), math.exp(-4)
    row = [corner, side, corner, side, corner]
    assert_close(heat[0], torch.tensor([row, [side, 1, side, 1, side], row]))
    assert float(heat[1].sum()) == 0.0


def _iou(box: list[float], width: float, height: float) -> float:
    inner = max(0.0, min(box[2], width) - max(box[0], 0.0)) * max(0.0, min(box[3], height) - max(box[1], 0.0))
    return inner / (width * height + (box[2] - box[0]) * (box[3] - box[1]) - inner)


@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("sides", [(10.0, 10.0), (4.0, 25.0), (60.0, 3.0), (0.02, 0.5)])
def test_corners_within_the_radius_keep_the_overlap_and_just_so(sides: tuple[float, float], overlap: float) -> None:
    radius = float(overlap_radius(torch.tensor([sides], dtype=torch.float64), overlap)[0])
    worst = 1.0
    for shares in itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=4):
        a, b, c, d = (share * radius for share in shares)
        worst = min(worst, _iou([a, b, sides[0] + c, sides[1] + d], *sides))
    assert worst == pytest.approx(overlap, abs=1e-9)


def test_the_radius_of_a_square_by_hand() -> None:
    # both corners inwards is the strictest: (10 - 2r)^2 = 70
    assert_close(overlap_radius(torch.tensor([[10.0, 10.0]]), 0.7), torch.tensor([(10 - math.sqrt(70)) / 2]))


def test_objects_are_cut_to_the_image_and_crowds_left_out() -> None:
    targets = [
        _target(
            [[4, 4, 20, 12], [-8, -8, 8, 1e30], [40, 40, 60, 60], [0, 0, 32, 32]], [1, 0, 1, 1], [False] * 3 + [True]
        ),
        _target([]),
        _target([[0, 0, 32, 32]], [2]),
    ]
    found = objects_in_cells(targets, (32, 32), 4, torch.zeros(()))
    assert_close(found.boxes, torch.tensor([[1.0, 1, 5, 3], [0, 0, 2, 8], [0, 0, 8, 8]]))
    assert found.labels.tolist() == [1, 0, 2] and found.image.tolist() == [0, 0, 2]


def test_points_on_the_far_border_belong_to_the_last_cell() -> None:
    points = torch.tensor([[0.0, 0.0], [2.99, 1.5], [3.0, 2.0]])
    assert cells_of(points, (2, 3)).tolist() == [[0, 0], [2, 1], [2, 1]]


def test_the_smallest_object_of_a_cell_owns_it_whatever_its_class() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [1, 1, 3, 3], [0, 0, 4, 4], [0, 0, 1, 1]])
    objects = CellObjects(boxes, torch.tensor([0, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 1, 1]))
    cells = cells_of((boxes[:, :2] + boxes[:, 2:]) / 2, (4, 4))
    assert own_cells(objects, cells, 2, (4, 4)).tolist() == [1, 3, 4]


def test_the_class_and_the_image_say_the_plane() -> None:
    objects = objects_in_cells([_target([]), _target([[0, 0, 32, 32]], [1])], (32, 32), 4, torch.zeros(()))
    heat = GaussianHeatmaps(min_overlap=0.3)(objects, torch.tensor([[2, 2]]), (2, 3, 8, 8))
    assert float(heat.sum()) == float(heat[1, 1].sum()) > 1.0 and float(heat[1, 1, 2, 2]) == 1.0
    with pytest.raises(ValueError, match=r"min_overlap is 1\.0"):
        GaussianHeatmaps(min_overlap=1.0)


def test_cells_mostly_inside_a_crowd_are_marked() -> None:
    crowd = _target([[6, 4, 16, 100], [0, 0, 8, 8]], crowd=[True, False])
    found = crowd_cells([_target([[0, 0, 8, 8]]), crowd], (3, 4), 4, torch.zeros(()))
    assert found is not None and not bool(found[0].any())
    assert found[1].tolist() == [[False] * 4, [False, True, True, True], [False, True, True, True]]
    assert crowd_cells([_target([])], (3, 4), 4, torch.zeros(())) is None


def test_two_thousand_objects_in_an_image() -> None:
    corner = torch.rand(2000, 2) * 100
    boxes = torch.cat([corner, corner + 1 + torch.rand(2000, 2) * 27], dim=1)
    target = Target(boxes=boxes, labels=torch.randint(0, 5, (2000,)))
    objects = objects_in_cells([target], (128, 128), 4, torch.zeros(()))
    cells = cells_of((objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2, (32, 32))
    heat = GaussianHeatmaps()(objects, cells, (1, 5, 32, 32))
    distinct = len({(label, *cell) for label, cell in zip(objects.labels.tolist(), cells.tolist(), strict=True)})
    assert int((heat == 1).sum()) == distinct > 500
    assert len(own_cells(objects, cells, 1, (32, 32))) == len(set(map(tuple, cells.tolist())))
