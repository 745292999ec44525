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
