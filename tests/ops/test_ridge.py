import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.testing import assert_close

from detseg.ops import ridge
from detseg.ops.ridge import fit_ridge


def examples(count: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64) + 2
    mixing = torch.randn(width, 4, generator=generator, dtype=torch.float64)
    return features, features @ mixing + 0.1 * torch.randn(count, 4, generator=generator, dtype=torch.float64) - 5


def test_one_feature_by_hand() -> None:
    """x = -1, 0, 1 and t = 0, 2, 4: slope 4 / (2 + lambda), intercept the mean of t."""
    features, targets = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[0.0], [2.0], [4.0]])
    weight, bias = fit_ridge(features, targets, strength=2.0)
    assert_close(weight, torch.tensor([[1.0]], dtype=torch.float64))
    assert_close(bias, torch.tensor([2.0], dtype=torch.float64))


@pytest.mark.parametrize(("count", "width"), [(50, 7), (7, 50), (20, 20), (1, 3)])
@pytest.mark.parametrize("strength", [1e-2, 1000.0])
def test_is_least_squares_on_the_augmented_rows(
    count: int, width: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lambda |W|^2 is what rows sqrt(lambda) I with targets 0 add to the squares; the intercept has no such row."""
    monkeypatch.setattr(ridge, "ROWS", 6)  # several blocks
    features, targets = examples(count, width)
    rows = np.block(
        [
            [features.numpy(), np.ones((count, 1))],
            [np.sqrt(strength) * np.eye(width), np.zeros((width, 1))],
        ]
    )
    expected = np.linalg.lstsq(rows, np.concatenate([targets.numpy(), np.zeros((width, 4))]), rcond=None)[0]
    weight, bias = fit_ridge(features, targets, strength=strength)
    assert_close(weight, torch.from_numpy(expected[:-1]))
    assert_close(bias, torch.from_numpy(expected[-1]))


@pytest.mark.parametrize(("count", "width"), [(40, 6), (6, 40)])
def test_is_scikit_learns_ridge(count: int, width: int) -> None:
    features, targets = examples(count, width)
    oracle = Ridge(alpha=3.0).fit(features.numpy(), targets.numpy())
    weight, bias = fit_ridge(features, targets, strength=3.0)
    assert_close(weight, torch.from_numpy(oracle.coef_.T.copy()))
    assert_close(bias, torch.from_numpy(oracle.intercept_))


def test_features_may_be_in_half_precision() -> None:
    features, targets = examples(30, 5)
    half = features.half()
    assert_close(fit_ridge(half, targets, strength=1.0)[0], fit_ridge(half.double(), targets, strength=1.0)[0])


def test_what_cannot_be_fitted_is_said() -> None:
    features, targets = examples(5, 3)
    with pytest.raises(ValueError, match="0 examples"):
        fit_ridge(features[:0], targets[:0], strength=1.0)
    with pytest.raises(ValueError, match="5 examples, 4 targets"):
        fit_ridge(features, targets[:4], strength=1.0)
    with pytest.raises(ValueError, match="strength 0"):
        fit_ridge(features, targets, strength=0)
