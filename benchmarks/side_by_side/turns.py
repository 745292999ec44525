"""Calls timed in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds_in_turns(calls: Sequence[Callable[[], object]], rounds: int, *, device: str = "cpu") -> list[list[float]]:
    """Return the seconds of each call in every round, ``(calls, rounds)``, after one round that does not count.

    Args:
        calls: what is compared; in every round all of them run, one after the other.
        rounds: how many count.
        device: is waited for, where it is no CPU.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times.append(time.perf_counter() - start)
    return taken


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of how many times as long theirs took, round by round."""
    return statistics.median(their / own for their, own in zip(theirs, ours, strict=True))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
