"""Learning rate schedules as factors of the peak, one value per optimiser step.

Each is a pure function of the step and a thin ``LambdaLR`` around it, whose state is plain numbers, so that a
checkpoint loads with ``weights_only=True``. Every parameter group keeps its own peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear(step: int, *, steps: int, start: float) -> float:
    """Return the factor of step 0..``steps`` of a linear rise from ``start`` to 1; 1 afterwards."""
    return 1.0 if step >= steps else start + (1.0 - start) * step / steps


def cosine(share: float, *, start: float, end: float) -> float:
    """Return half a cosine from ``start`` at share 0 to ``end`` at share 1 (SGDR, Loshchilov 2017, equation 5)."""
    return end + (start - end) * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2.0


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, start: float, end: float) -> float:
    """Return the factor of a linear rise, then half a cosine down to ``end`` at the last step."""
    if step < warmup_steps:
        return linear(step, steps=warmup_steps, start=start)
    return cosine((step - warmup_steps) / max(1, total_steps - 1 - warmup_steps), start=1.0, end=end)


def one_cycle(step: int, *, total_steps: int, warmup: float, start: float, end: float) -> float:
    """Return the factor of half a cosine up over the share ``warmup`` of all steps, then half a cosine down.

    The learning rate part of "Super-Convergence" (Smith and Topin 2017), annealed as in fastai and PyTorch; momentum
    stays as it is.
    """
    peak = warmup * total_steps
    if step < peak:
        return cosine(step / peak, start=start, end=1.0)
    return cosine((step - peak) / max(1.0, total_steps - 1 - peak), start=1.0, end=end)


def warmup_multistep(
    step: int, *, total_steps: int, warmup_steps: int, start: float, milestones: Sequence[float], gamma: float
) -> float:
    """Return the factor of a linear rise, then ``gamma`` once more at every share in ``milestones``."""
    falls = sum(step >= round(share * total_steps) for share in milestones)
    return linear(step, steps=warmup_steps, start=start) * gamma**falls


def polynomial(step: int, *, total_steps: int, warmup_steps: int, start: float, power: float, end: float) -> float:
    """Return the factor of a linear rise, times ``(1 - step / total) ** power``, never below ``end``.

    The "poly" policy of DeepLab (Chen et al., arXiv:1606.00915, section 4.1.2) and ParseNet.
    """
    falling = float((1.0 - min(step, total_steps) / total_steps) ** power)
    return max(end, linear(step, steps=warmup_steps, start=start) * falling)


def ramp(step: int, *, total_steps: int, start: float, end: float) -> float:
    """Return the factor of a geometric rise from ``start`` in step 0 to ``end`` in the last."""
    return float(start * (end / start) ** (min(step, total_steps - 1) / max(1, total_steps - 1)))


class WarmupCosine(LambdaLR):
    """``warmup_cosine`` for an optimiser.

    Args:
        optimizer: its groups' learning rates are the peaks.
        total_steps: optimiser steps of the whole training.
        warmup_steps: steps of linear rise; at most half of all.
        start: factor of the first step.
        end: factor of the last step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 100,
        start: float = 1e-3,
        end: float = 0.0,
    ) -> None:
        rise = min(warmup_steps, total_steps // 2)
        super().__init__(
            optimizer, partial(warmup_cosine, total_steps=total_steps, warmup_steps=rise, start=start, end=end)
        )


class OneCycle(LambdaLR):
    """``one_cycle`` for an optimiser.

    Args:
        optimizer: its groups' learning rates are the peaks.
        total_steps: optimiser steps of the whole training.
        warmup: share of all steps over which the rate rises, in [0, 1).
        start: factor of the first step.
        end: factor of the last step.
    """

    def __init__(
        self, optimizer: Optimizer, *, total_steps: int, warmup: float = 0.3, start: float = 0.04, end: float = 1e-3
    ) -> None:
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"scheduler.warmup is {warmup}; it is a share of all steps, in [0, 1)")
        super().__init__(optimizer, partial(one_cycle, total_steps=total_steps, warmup=warmup, start=start, end=end))


class WarmupMultiStep(LambdaLR):
    """``warmup_multistep`` for an optimiser: the detectors' usual "1x" schedule with its defaults.

    Args:
        optimizer: its groups' learning rates are the peaks.
        total_steps: optimiser steps of the whole training.
        warmup_steps: steps of linear rise; at most half of all.
        start: factor of the first step.
        milestones: shares of all steps, in [0, 1], at which the rate falls.
        gamma: factor of each fall.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 500,
        start: float = 1e-3,
        milestones: Sequence[float] = (8 / 12, 11 / 12),
        gamma: float = 0.1,
    ) -> None:
        if any(not 0.0 <= share <= 1.0 for share in milestones):
            raise ValueError(f"scheduler.milestones are {list(milestones)}; each is a share of all steps, in [0, 1]")
        rise = min(warmup_steps, total_steps // 2)
        factor = partial(
            warmup_multistep,
            total_steps=total_steps,
            warmup_steps=rise,
            start=start,
            milestones=tuple(milestones),
            gamma=gamma,
        )
        super().__init__(optimizer, factor)


class Polynomial(LambdaLR):
    """``polynomial`` for an optimiser.

    Args:
        optimizer: its groups' learning rates are the peaks.
        total_steps: optimiser steps of the whole training.
        power: 1 falls along a line; 0.9 in DeepLab.
        warmup_steps: steps of linear rise; at most half of all.
        start: factor of the first step of the rise.
        end: least factor.

    Raises:
        ValueError: the power is not above 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        power: float = 0.9,
        warmup_steps: int = 0,
        start: float = 1e-3,
        end: float = 0.0,
    ) -> None:
        if power <= 0.0:
            raise ValueError(f"scheduler.power is {power}; it must be above 0, as DeepLab's 0.9")
        rise = min(warmup_steps, total_steps // 2)
        factor = partial(
            polynomial, total_steps=max(1, total_steps), warmup_steps=rise, start=start, power=power, end=end
        )
        super().__init__(optimizer, factor)


class Ramp(LambdaLR):
    """A rise by the same factor in every step: the range test of ``detseg find lr``.

    Args:
        optimizer: its groups' learning rates are what the factors multiply.
        total_steps: optimiser steps of the whole rise.
        start: factor of the first step.
        end: factor of the last step.
    """

    def __init__(self, optimizer: Optimizer, *, total_steps: int, start: float, end: float) -> None:
        super().__init__(optimizer, partial(ramp, total_steps=total_steps, start=start, end=end))
