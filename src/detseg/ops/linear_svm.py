"""A linear support vector machine by coordinate descent in the dual.

Hsieh, Chang, Lin, Keerthi and Sundararajan 2008, `"A Dual Coordinate Descent Method for Large-scale Linear SVM"
<https://doi.org/10.1145/1390156.1390208>`_, algorithm 3 (with shrinking), for the hinge loss: what liblinear's solver 3
does, and so scikit-learn's ``LinearSVC(loss="hinge")``, whose objective this is. scikit-learn itself would be a
dependency of every user, with SciPy, for this one function.

Letters: N examples, D features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class LinearSVM(NamedTuple):
    """A fitted machine; the margin of x is ``x @ weight + bias``.

    Attributes:
        weight: ``(D,)`` in the type of the features.
        bias: of the decision.
        dual: ``(N,)`` the examples' multipliers in [0, cost]; 0 for those beyond their margin.
    """

    weight: Tensor
    bias: float
    dual: Tensor


def fit_linear_svm(
    features: Tensor,
    positive: Tensor,
    *,
    cost: float,
    positive_weight: float = 1.0,
    bias_scale: float = 1.0,
    tolerance: float = 1e-3,
    max_passes: int = 1000,
    start: Tensor | None = None,
) -> LinearSVM:
    """Minimise ``|w|^2 / 2 + (b / s)^2 / 2 + sum_i c_i max(0, 1 - y_i (w x_i + b))`` (equation 1, with c_i per class).

    Args:
        features: ``(N, D)`` floating point, in host memory.
        positive: ``(N,)`` bool, y = 1 where true and -1 elsewhere.
        cost: c of a negative example.
        positive_weight: factor of a positive one's.
        bias_scale: s; the larger, the less the bias is held small.
        tolerance: largest spread of the projected gradient at which the answer is taken.
        max_passes: after so many times N visits of an example it is taken in any case.
        start: ``(N,)`` multipliers to go on from, such as those of a fit to most of these examples.

    Raises:
        ValueError: only one kind of example is there, a shape disagrees or a number is not positive.
    """
    count = len(features)
    if positive.shape != (count,) or (start is not None and start.shape != (count,)):
        raise ValueError(f"fit_linear_svm: {count} examples but positive is {tuple(positive.shape)}; give one of each")
    if not bool(positive.any()) or bool(positive.all()):
        raise ValueError(
            f"fit_linear_svm: {int(positive.sum())} of {count} examples are positive; both kinds must occur"
        )
    if min(cost, positive_weight, bias_scale, tolerance) <= 0:
        raise ValueError(
            f"fit_linear_svm: cost={cost}, positive_weight={positive_weight}, bias_scale={bias_scale} and "
            f"tolerance={tolerance} must be above 0"
        )
    signs = np.where(positive.numpy(), 1.0, -1.0)  # (N,)
    upper = np.where(positive.numpy(), cost * positive_weight, cost)  # (N,)
    rows = np.concatenate(
        [features.numpy(), np.full((count, 1), bias_scale, features.numpy().dtype)], axis=1
    )  # (N, D+1)
    dual = np.zeros(count) if start is None else np.clip(start.double().numpy(), 0.0, upper)  # (N,)
    weight = ((dual * signs) @ rows).astype(rows.dtype)  # (D + 1,)
    _descend(rows, signs, upper, dual, weight, tolerance, max_passes)
    return LinearSVM(torch.from_numpy(weight[:-1].copy()), float(weight[-1]) * bias_scale, torch.from_numpy(dual))


def _descend(
    rows: Array, signs: Array, upper: Array, dual: Array, weight: Array, tolerance: float, max_passes: int
) -> None:
    """Change ``dual`` and ``weight`` in place until the projected gradient is flat."""
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)  # (N,), the diagonal of Q
    chance = np.random.default_rng(0)  # of the order alone: the same examples give the same machine
    active = np.arange(len(rows))
    highest, lowest = math.inf, -math.inf  # gradients beyond which an example at its bound is left out
    visits = max_passes * len(rows)
    while visits > 0:
        visits -= len(active)
        chance.shuffle(active)
        kept, most, least = _sweep(rows, signs, upper, dual, weight, squares, active, highest, lowest)
        flat = most - least < tolerance
        if flat and len(active) == len(rows):
            return
        # Once it is flat for those that are left, all are asked again.
        active = np.arange(len(rows)) if flat else active[kept]
        highest = math.inf if flat or most <= 0 else most
        lowest = -math.inf if flat or least >= 0 else least


def _sweep(
    rows: Array,
    signs: Array,
    upper: Array,
    dual: Array,
    weight: Array,
    squares: Array,
    active: Array,
    highest: float,
    lowest: float,
) -> tuple[Array, float, float]:
    """Visit each active example once; return which stay active, and the extremes of the projected gradient."""
    kept = np.ones(len(active), dtype=bool)
    most, least = -math.inf, math.inf
    for place, index in enumerate(active.tolist()):
        row, sign, alpha, bound = rows[index], signs[index], dual[index], upper[index]
        gradient = sign * float(row @ weight) - 1.0
        if (alpha <= 0.0 and gradient > highest) or (alpha >= bound and gradient < lowest):
            kept[place] = False
            continue
        outward = (alpha <= 0.0 and gradient > 0.0) or (alpha >= bound and gradient < 0.0)
        projected = 0.0 if outward else gradient
        most, least = max(most, projected), min(least, projected)
        if projected != 0.0:
            dual[index] = min(max(alpha - gradient / squares[index], 0.0), bound)
            weight += ((dual[index] - alpha) * sign) * row
    return kept, most, least
