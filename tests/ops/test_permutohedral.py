import math

import pytest
import torch
from torch.testing import assert_close

from detseg.ops.permutohedral import PermutohedralLattice, _corners


def lifted(points: torch.Tensor) -> torch.Tensor:
    """The points on the hyperplane of zero sum, by the paper's matrix, row by row."""
    dimensions = points.shape[1]
    out = torch.zeros(len(points), dimensions + 1, dtype=torch.float64)
    for axis in range(dimensions):
        scale = math.sqrt(2 / 3) * (dimensions + 1) / math.sqrt((axis + 1) * (axis + 2))
        out[:, : axis + 1] += scale * points[:, axis, None]
        out[:, axis + 1] -= scale * (axis + 1) * points[:, axis]
    return out


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_the_corners_hold_the_point(dimensions: int) -> None:
    points = torch.randn(500, dimensions, dtype=torch.float64) * 3
    corners, weight = _corners(points)
    assert weight.min() >= 0 and corners.sum(-1).abs().max() == 0
    assert_close(weight.sum(1), torch.ones(500, dtype=torch.float64))
    assert (corners.remainder(dimensions + 1) == torch.arange(dimensions + 1)[None, :, None]).all()
    assert_close((weight[..., None] * corners).sum(1), lifted(points))


@pytest.mark.parametrize(("dimensions", "spread"), [(1, 0.05), (2, 0.06), (3, 0.1)])
def test_it_is_about_a_gaussian_but_for_a_factor(dimensions: int, spread: float) -> None:
    points, values = torch.rand(1500, dimensions, dtype=torch.float64) * 5, torch.rand(1500, 2, dtype=torch.float64)
    exact = (-torch.cdist(points, points).square() / 2).exp() @ values
    ratio = PermutohedralLattice(points).filter(values) / exact
    assert 0.3 < float(ratio.mean()) < 1.1 and float(ratio.std() / ratio.mean()) < spread


def test_one_dimension_by_hand() -> None:
    """Two points on corners 0 and 2. Each has the next corner too, 1 and 3; two blurs with 1/2, 1, 1/2."""
    step = 2 / (math.sqrt(2 / 3) * 2 / math.sqrt(2))  # in deviations, from (0, 0) to (2, -2)
    points = torch.tensor([[0.0], [step]], dtype=torch.float64)
    found = PermutohedralLattice(points).filter(torch.eye(2, dtype=torch.float64))
    # 1, 0, 0, 0 becomes 1, 1/2, 0, 0 and then 1 + 1/4, 1/2 + 1/2, 1/4, 0; times 1 / (1 + 1/2).
    # 0, 0, 1, 0 becomes 0, 1/2, 1, 1/2 and then 1/4, 1/2 + 1/2, 1 + 1/4 + 1/4, 1/2 + 1/2.
    assert_close(found, torch.tensor([[5 / 6, 1 / 6], [1 / 6, 1]], dtype=torch.float64))


def slow(points: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The paper's algorithm over a table of corners, one point, one corner and one direction at a time."""
    corners, weight = _corners(points.double())
    table: dict[tuple[int, ...], torch.Tensor] = {}
    nothing = torch.zeros(values.shape[1], dtype=torch.float64)
    for own, shares, value in zip(corners.tolist(), weight, values.double(), strict=True):
        for corner, share in zip(map(tuple, own), shares, strict=True):
            table[corner] = table.get(corner, nothing) + share * value
    side = points.shape[1] + 1
    for direction in range(side):
        step = [1 - side * (axis == direction) for axis in range(side)]
        blurred = {}
        for corner, value in table.items():
            ahead, behind = (tuple(c + sign * s for c, s in zip(corner, step, strict=True)) for sign in (1, -1))
            blurred[corner] = value + (table.get(ahead, nothing) + table.get(behind, nothing)) / 2
        table = blurred
    sums = [
        sum((share * table[tuple(corner)] for corner, share in zip(own, shares, strict=True)), nothing)
        for own, shares in zip(corners.tolist(), weight, strict=True)
    ]
    return torch.stack(sums) / (1 + 2.0 ** -points.shape[1])


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_equals_a_slow_twin_in_single_and_double_precision(dimensions: int) -> None:
    points, values = torch.randn(200, dimensions) * 2, torch.rand(200, 3, dtype=torch.float64)
    lattice, expected = PermutohedralLattice(points), slow(points, values)
    assert_close(lattice.filter(values), expected)
    single = lattice.filter(values.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


def test_it_stays_on_the_device_of_the_points() -> None:
    points, values = torch.randn(20, 3), torch.rand(20, 2)
    with torch.device("meta"):  # where whatever is made without saying where has no values
        found = PermutohedralLattice(points).filter(values)
    assert_close(found, PermutohedralLattice(points).filter(values))


def test_it_is_linear_and_all_but_symmetric() -> None:
    """Not quite: where a corner is missing, a path over it counts in one order of the blurs and not in the other."""
    lattice = PermutohedralLattice(torch.randn(60, 5) * 2)
    kernel = lattice.filter(torch.eye(60, dtype=torch.float64))
    assert float((kernel - kernel.T).abs().sum() / kernel.sum()) < 0.1
    values = torch.randn(60, 3, dtype=torch.float64)
    assert_close(lattice.filter(values), kernel @ values)


def test_far_points_do_not_meet() -> None:
    found = PermutohedralLattice(torch.tensor([[0.0, 0], [50, 50]])).filter(torch.eye(2))
    assert found[0, 1] == 0 and found[0, 0] > 0


@pytest.mark.parametrize(
    "points", [torch.zeros(0, 2), torch.zeros(3, 0), torch.tensor([[float("nan")]]), torch.ones(3)]
)
def test_what_is_no_set_of_points_is_refused(points: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be \\(N, D\\) finite numbers"):
        PermutohedralLattice(points)


def test_too_wide_a_span_is_refused() -> None:
    with pytest.raises(ValueError, match="too many to number"):
        PermutohedralLattice(torch.tensor([[0.0] * 5, [1e6] * 5]))
