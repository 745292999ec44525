"""Learning rate schedules against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from detseg.tasks.schedules import (
    OneCycle,
    Polynomial,
    WarmupCosine,
    WarmupMultiStep,
    cosine,
    one_cycle,
    warmup_cosine,
)


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int, peaks: tuple[float, ...] = (1.0,)):
    """Return the learning rate of the last group at every step."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_by_hand():
    assert [cosine(share, start=1, end=0) for share in (0, 0.5, 1, 7)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine(1 / 3, start=1, end=0) == pytest.approx(0.75)


def test_warmup_cosine_rises_linearly_and_ends_at_its_end():
    seen = rates(lambda optimizer: WarmupCosine(optimizer, total_steps=9, warmup_steps=4, start=0.2, end=0.1), 9)
    assert seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert seen[6] == pytest.approx(0.55) and seen[8] == pytest.approx(0.1)


def test_a_short_run_warms_up_over_half_of_it():
    seen = rates(lambda optimizer: WarmupCosine(optimizer, total_steps=8, warmup_steps=100), 8)
    assert max(seen) == 1.0 and seen.index(1.0) == 4


def test_one_cycle_is_pytorchs_away_from_its_rounding_of_the_peak():
    """PyTorch puts the peak at ``warmup * total - 1``, ours at ``warmup * total``: the same curve, one step later."""
    ours = rates(lambda optimizer: OneCycle(optimizer, total_steps=100, warmup=0.3, start=0.04, end=1e-3), 100)
    theirs = rates(
        lambda optimizer: OneCycleLR(
            optimizer, max_lr=1.0, total_steps=100, pct_start=0.31, div_factor=25, final_div_factor=40
        ),
        99,
    )
    assert ours[0] == pytest.approx(0.04) and ours[30] == 1.0 and ours[99] == pytest.approx(1e-3)
    assert ours[:99] == pytest.approx(theirs, abs=2e-9)


def test_one_cycle_without_a_rise_starts_at_the_peak():
    assert one_cycle(0, total_steps=10, warmup=0.0, start=0.04, end=0.0) == 1.0


def test_multistep_falls_at_shares_of_the_whole():
    seen = rates(lambda optimizer: WarmupMultiStep(optimizer, total_steps=12, warmup_steps=2, start=0.5, gamma=0.1), 12)
    assert seen == pytest.approx([0.5, 0.75, *[1.0] * 6, *[0.1] * 3, 0.01])


def test_every_group_keeps_its_own_peak():
    seen = rates(lambda optimizer: WarmupCosine(optimizer, total_steps=4, warmup_steps=0), 1, peaks=(1.0, 0.1))
    assert seen == pytest.approx([0.1])


def test_one_step_in_all_is_no_division_by_zero():
    assert warmup_cosine(0, total_steps=1, warmup_steps=0, start=1e-3, end=0.0) == 1.0
    assert len(rates(lambda optimizer: OneCycle(optimizer, total_steps=1), 1)) == 1


def test_state_is_plain_and_resumes():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    first = OneCycle(optimizer, total_steps=10)
    optimizer.step()
    first.step()
    state = first.state_dict()
    assert not [value for value in state.values() if callable(value)]
    second = OneCycle(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), total_steps=10)
    second.load_state_dict(state)
    assert second.last_epoch == 1 and second.get_last_lr() == first.get_last_lr()


@pytest.mark.parametrize("kind, argument", [(OneCycle, {"warmup": 1.0}), (WarmupMultiStep, {"milestones": (8, 11)})])
def test_shares_are_checked(kind: type[LRScheduler], argument: dict[str, object]):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"share of all steps"):
        kind(optimizer, total_steps=10, **argument)


def test_poly_falls_as_deeplabs_and_ends_near_nothing():
    seen = rates(lambda optimizer: Polynomial(optimizer, total_steps=10), 10)
    assert seen == pytest.approx([(1 - step / 10) ** 0.9 for step in range(10)])
    line = rates(lambda optimizer: Polynomial(optimizer, total_steps=4, power=1.0, end=0.4), 4)
    assert line == pytest.approx([1, 0.75, 0.5, 0.4])


def test_poly_rises_first_where_it_is_told_to():
    seen = rates(lambda optimizer: Polynomial(optimizer, total_steps=8, power=1.0, warmup_steps=2, start=0.5), 8)
    assert seen[:3] == pytest.approx([0.5, 0.75 * 7 / 8, 6 / 8])
    with pytest.raises(ValueError, match=r"scheduler\.power is 0"):
        rates(lambda optimizer: Polynomial(optimizer, total_steps=8, power=0), 1)
