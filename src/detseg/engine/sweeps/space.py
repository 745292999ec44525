"""The space that ``detseg tune`` searches, read from Hydra's own sweep grammar.

``key=choice(a,b)`` and ``key=a,b`` are sets; ``key=interval(low,high)`` is a range of real numbers,
``int(interval(...))`` of whole ones, both ends included; ``key=range(start,stop,step)`` counts as Python's ``range``
does; ``tag(log, ...)`` draws on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer, ValueType

from detseg.config import ConfigError, quoted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = str | int | float
"""What is drawn: the text of a choice, or a number."""


@dataclass(frozen=True)
class Choice:
    """One of several values, without an order.

    Attributes:
        values: as they are typed behind ``key=``.
    """

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """Numbers between two ends, both included.

    Attributes:
        low: smallest.
        high: largest.
        log: drawn evenly in the logarithm.
        step: distance between whole numbers; ``None`` for real ones.
    """

    low: float
    high: float
    log: bool = False
    step: int | None = None


Dimension = Choice | Interval


@dataclass(frozen=True)
class Space:
    """What is searched, and what is the same in all trials.

    Attributes:
        fixed: overrides of every trial.
        dimensions: what varies, by key.
    """

    fixed: tuple[str, ...]
    dimensions: Mapping[str, Dimension]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the dimensions as Optuna's distributions."""
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}

    def grid(self) -> list[dict[str, Value]]:
        """Return every combination of the values.

        Raises:
            ConfigError: a dimension is an interval of real numbers, which has no end of values.
        """
        columns = [discrete(key, dimension) for key, dimension in self.dimensions.items()]
        return [dict(zip(self.dimensions, row, strict=True)) for row in product(*columns)]


def read_space(overrides: Sequence[str]) -> Space:
    """Sort overrides into those that are searched and those that are fixed.

    Args:
        overrides: as typed after ``detseg tune``.

    Raises:
        ConfigError: an override is not Hydra's grammar, or its range is empty, or too wide for a logarithm.
    """
    texts = quoted(overrides)
    parsed = OverridesParser.create().parse_overrides(texts)
    swept = {override.get_key_element(): _dimension(override) for override in parsed if override.is_sweep_override()}
    fixed = tuple(text for text, override in zip(texts, parsed, strict=True) if not override.is_sweep_override())
    return Space(fixed=fixed, dimensions=swept)


def typed(values: Mapping[str, Value]) -> list[str]:
    """Return drawn values as overrides; a number is written so that reading it gives the same one."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()]


def discrete(key: str, dimension: Dimension) -> Sequence[Value]:
    """Return all values of a dimension; ``key`` is for the message where there is no end of them."""
    if isinstance(dimension, Choice):
        return dimension.values
    if dimension.step is None:
        raise ConfigError(f"{key}: an interval of real numbers has no grid; give {key}=choice(...) or tune.sampler=tpe")
    return range(int(dimension.low), int(dimension.high) + 1, dimension.step)


def _dimension(override: Override) -> Dimension:
    key, value = override.get_key_element(), override.value()
    log = "log" in (getattr(value, "tags", None) or ())
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        raise ConfigError(f"{override.input_line}: name the choices, as in {key}=choice(a,b)")
    if isinstance(value, IntervalSweep):
        return _interval(override, value, log)
    if isinstance(value, RangeSweep) and all(isinstance(end, int) for end in (value.start, value.stop, value.step)):
        return _range(override, value, log)
    texts = tuple(_text(item) for item in override.sweep_iterator(transformer=Transformer.encode))
    if not texts:
        raise ConfigError(f"{override.input_line} has no values: give at least one")
    return Choice(tuple(dict.fromkeys(texts)))


def _text(value: Any) -> str:
    """Return one choice as typed; a number of a float range without the dust of its additions."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _interval(override: Override, value: IntervalSweep, log: bool) -> Interval:
    low, high = value.start, value.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise ConfigError(f"{override.input_line}: the interval from {low} to {high} is empty; write (smaller,larger)")
    whole = isinstance(low, int) and isinstance(high, int)
    return _logarithmic(override, Interval(low=low, high=high, log=log, step=1 if whole else None))


def _range(override: Override, value: RangeSweep, log: bool) -> Dimension:
    assert isinstance(value.start, int) and isinstance(value.stop, int) and isinstance(value.step, int)
    numbers = sorted(range(value.start, value.stop, value.step))
    if not numbers:
        raise ConfigError(f"{override.input_line} has no values: from {value.start}, {value.stop} is not reached")
    if len(numbers) == 1:
        return Choice((str(numbers[0]),))
    return _logarithmic(override, Interval(low=numbers[0], high=numbers[-1], log=log, step=abs(value.step)))


def _logarithmic(override: Override, interval: Interval) -> Interval:
    """Return ``interval``, or raise where it has no logarithm."""
    if interval.log and interval.low <= 0:
        raise ConfigError(f"{override.input_line}: a logarithm needs numbers above 0, and {interval.low} is not")
    if interval.log and (interval.step or 1) != 1:
        raise ConfigError(f"{override.input_line}: whole numbers on a logarithmic scale have the step 1")
    return interval


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if dimension.step is None:
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=dimension.step)
