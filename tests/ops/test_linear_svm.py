import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.testing import assert_close

from detseg.ops.linear_svm import fit_linear_svm


def examples(count: int = 120, width: int = 8, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two clouds that overlap, one in six examples positive, of norm about 20 as R-CNN scales its features."""
    generator = torch.Generator().manual_seed(7)
    positive = torch.arange(count) % 6 == 0
    features = torch.randn(count, width, generator=generator, dtype=torch.float64)
    features[positive, :3] += shift
    return features * 20 / features.norm(dim=1).mean(), positive


def objective(
    features: Tensor, positive: Tensor, weight: Tensor, bias: float, cost: float, heavier: float, s: float
) -> float:
    signs = positive.double() * 2 - 1
    costs = torch.where(positive, cost * heavier, cost).double()
    hinge = (1 - signs * (features @ weight.double() + bias)).clamp(min=0)
    return float(weight.double().square().sum() / 2 + (bias / s) ** 2 / 2 + (costs * hinge).sum())


@pytest.mark.parametrize(("cost", "shift"), [(1e-3, 1.0), (1e-2, 0.3), (1.0, 8.0)])
def test_is_scikit_learns_linear_svc(cost: float, shift: float) -> None:
    features, positive = examples(shift=shift)
    own = fit_linear_svm(features, positive, cost=cost, positive_weight=2, bias_scale=10, tolerance=1e-6)
    oracle = LinearSVC(
        loss="hinge", C=cost, class_weight={1: 2.0}, intercept_scaling=10, tol=1e-8, max_iter=200_000, random_state=0
    )
    oracle.fit(features.numpy(), positive.numpy().astype(int))
    assert_close(own.weight, torch.from_numpy(oracle.coef_[0]), rtol=1e-3, atol=1e-4)
    assert own.bias == pytest.approx(float(oracle.intercept_[0]), rel=1e-3, abs=1e-4)
    values = [
        objective(features, positive, weight, bias, cost, 2, 10)
        for weight, bias in [(own.weight, own.bias), (torch.from_numpy(oracle.coef_[0]), float(oracle.intercept_[0]))]
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6, abs=2e-6)


def test_two_points_by_hand() -> None:
    """x = +-2, free cost and a bias that costs much: w = 1/2, the margins are 1, the multipliers sum to w / 2."""
    features = torch.tensor([[2.0], [-2.0]])
    found = fit_linear_svm(features, torch.tensor([True, False]), cost=10, bias_scale=1e-3, tolerance=1e-7)
    assert_close(found.weight, torch.tensor([0.5]))
    assert found.bias == pytest.approx(0, abs=1e-6)
    assert float(found.dual.sum()) == pytest.approx(0.25)


def test_multipliers_tell_where_examples_lie_and_are_the_weights() -> None:
    features, positive = examples()
    found = fit_linear_svm(features, positive, cost=1e-2, tolerance=1e-6)
    margins = (features @ found.weight + found.bias) * (positive.double() * 2 - 1)
    assert ((found.dual >= 0) & (found.dual <= 1e-2)).all()
    assert (margins[found.dual == 0] >= 1 - 1e-4).all() and (margins[found.dual >= 1e-2] <= 1 + 1e-4).all()
    between = (found.dual > 1e-6) & (found.dual < 1e-2 - 1e-6)
    assert between.any()
    assert_close(margins[between], torch.ones_like(margins[between]), rtol=0, atol=1e-4)
    assert_close(found.weight, (found.dual * (positive.double() * 2 - 1)) @ features)


def test_a_start_changes_the_way_and_not_the_answer() -> None:
    features, positive = examples()
    first = fit_linear_svm(features, positive, cost=1e-2, tolerance=1e-6)
    again = fit_linear_svm(features, positive, cost=1e-2, tolerance=1e-6, start=first.dual)
    few = fit_linear_svm(features, positive, cost=1e-2, tolerance=1e-6, start=first.dual, max_passes=1)
    assert_close(again.weight, first.weight, rtol=1e-4, atol=1e-5)
    assert_close(few.weight, first.weight, rtol=1e-4, atol=1e-5)
    cold = fit_linear_svm(features, positive, cost=1e-2, tolerance=1e-6, max_passes=1)
    assert (cold.weight - first.weight).abs().max() > 1e-3


def test_single_precision_suffices_and_the_same_examples_give_the_same_machine() -> None:
    features, positive = examples()
    exact = fit_linear_svm(features, positive, cost=1e-3, tolerance=1e-5)
    single = fit_linear_svm(features.float(), positive, cost=1e-3, tolerance=1e-5)
    assert single.weight.dtype == torch.float32
    assert_close(single.weight.double(), exact.weight, rtol=1e-2, atol=1e-4)
    twice = fit_linear_svm(features.float(), positive, cost=1e-3, tolerance=1e-5)
    assert np.array_equal(single.weight.numpy(), twice.weight.numpy())


def test_what_cannot_be_fitted_is_said() -> None:
    features, positive = examples(30)
    with pytest.raises(ValueError, match="0 of 30 examples are positive"):
        fit_linear_svm(features, torch.zeros(30, dtype=torch.bool), cost=1)
    with pytest.raises(ValueError, match="30 of 30"):
        fit_linear_svm(features, torch.ones(30, dtype=torch.bool), cost=1)
    with pytest.raises(ValueError, match="30 examples but positive is"):
        fit_linear_svm(features, positive[:4], cost=1)
    with pytest.raises(ValueError, match="cost=0"):
        fit_linear_svm(features, positive, cost=0)
