"""Ridge regression in closed form.

Hoerl and Kennard 1970, `"Ridge Regression: Biased Estimation for Nonorthogonal Problems"
<https://doi.org/10.1080/00401706.1970.10488634>`_, with an intercept that is not penalised. Of the two forms of the
normal equations the smaller is solved: D x D, or N x N where there are fewer examples than features.

Letters: N examples, D features, T targets.
"""

from __future__ import annotations

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
    count, width = features.shape
    mean = (
        sum((some.double().sum(0) for some in torch.split(features, ROWS)), torch.zeros(width).double()) / count
    )  # (D,)
    middle = targets.double().mean(0)  # (T,)
    wanted = targets.double() - middle  # (N, T)
    if count < width:
        gram = torch.empty(count, count, dtype=torch.float64)  # (N, N)
        for first, some in zip(range(0, count, ROWS), torch.split(features, ROWS), strict=True):
            for second, other in zip(range(0, count, ROWS), torch.split(features, ROWS), strict=True):
                product = (some.double() - mean) @ (other.double() - mean).T
                gram[first : first + ROWS, second : second + ROWS] = product
        shares = _solve(gram, wanted, strength)  # (N, T)
        weight = torch.zeros(width, wanted.shape[1], dtype=torch.float64)  # (D, T)
        for some, share in zip(torch.split(features, ROWS), torch.split(shares, ROWS), strict=True):
            weight += (some.double() - mean).T @ share
    else:
        gram, moment = (
            torch.zeros(width, width).double(),
            torch.zeros(width, wanted.shape[1]).double(),
        )  # (D, D), (D, T)
        for some, want in zip(torch.split(features, ROWS), torch.split(wanted, ROWS), strict=True):
            centred = some.double() - mean  # (n, D)
            gram.addmm_(centred.T, centred)
            moment.addmm_(centred.T, want)
        weight = _solve(gram, moment, strength)  # (D, T)
    return weight, middle - mean @ weight


def _solve(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """Return ``(gram + strength I)^-1 moment``; ``gram`` is changed."""
    gram.diagonal().add_(strength)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
