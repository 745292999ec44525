"""The processes of a run that has several: how many there are, and what each of them has."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, distributed

Value = TypeVar("Value")


def world_size() -> int:
    """Return how many processes train together; 1 where nothing joined them, as for a task without a trainer."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(value: Value) -> list[Value]:
    """Return the value of every process, in the order of their ranks; every process must call it."""
    if world_size() == 1:
        return [value]
    found: list[Value] = [value] * world_size()
    distributed.all_gather_object(found, value)
    return found


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean over all processes; Lightning's has them wait for each other, and for their devices, before."""
    values = values.clone()
    distributed.all_reduce(values)
    return values / world_size()
