"""Ridge regression in closed form.

Hoerl and Kennard 1970, `"Ridge Regression: Biased Estimation for Nonorthogonal Problems"
<https://doi.org/10.1080/00401706.1970.10488634>`_, with an intercept that is not penalised. Of the two forms of the
normal equations the smaller is solved: D x D, or N x N where there are fewer examples than features.

Letters: N examples, D features, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 1024  # examples that are in double precision at a time


def fit_ridge(features: Tensor, targets: Tensor, *, strength: float) -> tuple[Tensor, Tensor]:
    """Minimise ``|targets - features @ W - b|^2 + strength |W|^2``.

    Memory: two matrices of min(N, D) squared in double precision, beside the features as they are.

    Args:
        features: ``(N, D)`` floating point of any precision, N at least 1.
        targets: ``(N, T)``.
        strength: lambda, above 0.

    Returns:
        Weights ``(D, T)`` and intercepts ``(T,)``, double.

    Raises:
        ValueError: there is no example, the numbers disagree, or ``strength`` is not positive.
    """
    if len(features) == 0 or len(features) != len(targets) or strength <= 0:
        raise ValueError(
            f"fit_ridge: {len(features)} examples, {len(targets)} targets and strength {strength}; there must be at "
            "least one, as many of both, and a strength above 0"
        )
    blocks = torch.split(features, ROWS)
    mean = torch.stack([some.double().sum(0) for some in blocks]).sum(0) / len(features)  # (D,)
    middle = targets.double().mean(0)  # (T,)
    solve = _by_examples if len(features) < features.shape[1] else _by_features
    weight = solve(blocks, mean, targets.double() - middle, strength)  # (D, T)
    return weight, middle - mean @ weight


def _by_features(blocks: Sequence[Tensor], mean: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Return ``(X'X + strength I)^-1 X'T``, where X are the blocks' rows less ``mean``."""
    gram = mean.new_zeros(len(mean), len(mean))  # (D, D)
    moment = mean.new_zeros(len(mean), targets.shape[1])  # (D, T)
    for some, wanted in zip(blocks, torch.split(targets, ROWS), strict=True):
        centred = some.double() - mean  # (n, D)
        gram.addmm_(centred.T, centred)
        moment.addmm_(centred.T, wanted)
    return _solve(gram, moment, strength)


def _by_examples(blocks: Sequence[Tensor], mean: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Return the same as ``X'(XX' + strength I)^-1 T``."""
    products = [torch.cat([(one.double() - mean) @ (two.double() - mean).T for two in blocks], dim=1) for one in blocks]
    shares = _solve(torch.cat(products), targets, strength)  # (N, T)
    weight = mean.new_zeros(len(mean), targets.shape[1])  # (D, T)
    for some, share in zip(blocks, torch.split(shares, ROWS), strict=True):
        weight.addmm_((some.double() - mean).T, share)
    return weight


def _solve(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """Return ``(gram + strength I)^-1 moment``; ``gram`` is changed."""
    gram.diagonal().add_(strength)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
