"""Pictures of a sweep: which values go with which figure, and how much of it each key explains.

The share of a key is the adjusted R squared (Ezekiel, "Methods of Correlation Analysis", 1930) of least squares on that
key alone: the mean of each of its values, or a parabola over numbers, of which there are many. Keys that act only
together have small shares each; what chance alone would explain is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detseg.engine.sweeps.space import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from detseg.engine.sweeps.space import Space
    from detseg.engine.sweeps.sweep import Row

FEW = 4
"""Up to so many distinct numbers have a mean each; more are fitted by a parabola."""

TICKS = 6
"""Up to so many numbers are all named on their axis."""

NOMINAL_LIMIT = 12
"""Values of a key without an order that are named on its axis."""


def draw_sweep(
    directory: Path, rows: Sequence[Row], *, monitor: str, mode: str, space: Space | None = None
) -> list[Path]:
    """Draw ``parallel_coordinates.png`` and ``importance.png``; return the paths of those that there is something for.

    Args:
        directory: where they go.
        rows: of the sweep, complete ones with values.
        monitor: name of the figure.
        mode: ``"max"`` or ``"min"``: which end of it is drawn on top.
        space: what was searched; ``None``: an axis is logarithmic where its numbers span more than a factor of 20.
    """
    done = [row for row in rows if row.state == "complete" and row.values]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row.parameters) if _varies(rows, key)]
    if len(done) < 2 or not keys:
        return []
    paths = [_parallel(directory / "parallel_coordinates.png", rows, keys, monitor, mode, space)]
    shares = importance(done, keys, space)
    if shares:
        paths.append(_bars(directory / "importance.png", shares, monitor, len(done)))
    return paths


def importance(rows: Sequence[Row], keys: Sequence[str], space: Space | None = None) -> dict[str, float]:
    """Return the share in [0, 1] of the variance of the figure that each key explains by itself, the largest first.

    A key is left out where there are too few rows to say anything, such as one for each of its names.

    Args:
        rows: complete ones.
        keys: of the parameters to compare.
        space: what was searched, for logarithms.
    """
    figures = np.array([row.mean for row in rows])
    total = float(((figures - figures.mean()) ** 2).sum())
    shares = {}
    for key in keys:
        columns = _columns([row.parameters.get(key, "") for row in rows], _is_log(space, key))
        left = len(rows) - columns.shape[1]  # degrees of freedom
        if total == 0 or left < 1 or columns.shape[1] < 2:
            continue
        fitted = columns @ np.linalg.lstsq(columns, figures, rcond=None)[0]
        unexplained = float(((figures - fitted) ** 2).sum()) / left
        shares[key] = max(0.0, 1 - unexplained / (total / (len(rows) - 1)))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _columns(texts: Sequence[str], log: bool | None) -> np.ndarray[Any, Any]:
    """Return what least squares fit: (N, 3) powers of a number up to 2, or (N, V) ones where a value is the row's."""
    distinct = sorted(set(texts))
    if _numbers(texts) is None or len(distinct) <= FEW:
        return np.array([[float(text == value) for value in distinct] for text in texts])
    scale = _Scale(texts, log)
    places = np.array([scale(text) for text in texts])
    return np.stack([np.ones_like(places), places, places**2], axis=1)


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """Return all values as numbers, or ``None`` where one is not."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _varies(rows: Sequence[Row], key: str) -> bool:
    return len({row.parameters.get(key) for row in rows}) > 1


def _parallel(
    path: Path, rows: Sequence[Row], keys: Sequence[str], monitor: str, mode: str, space: Space | None
) -> Path:
    """Draw a line per row over an axis per key; colour and the last axis are the figure, grey has none."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    done = sorted((row for row in rows if row.values), key=lambda row: row.mean, reverse=mode == "min")
    low, high = min(row.mean for row in done), max(row.mean for row in done)
    figure = Figure(figsize=(max(6.0, 2.4 * (len(keys) + 1)), 4.8), layout="constrained")
    axes = figure.subplots()
    scales = [_Scale([row.parameters.get(key, "") for row in rows], _is_log(space, key)) for key in keys]
    for row in [row for row in rows if not row.values]:
        axes.plot(range(len(keys)), _heights(row, keys, scales), color="0.8", linewidth=1, zorder=1)
    for row in done:  # the best is drawn last, on top
        share = (row.mean - low) / (high - low) if high > low else 0.5
        colour = colormaps["viridis_r" if mode == "max" else "viridis"](share)
        line = [*_heights(row, keys, scales), share]
        best = row is done[-1]
        axes.plot(range(len(keys) + 1), line, color=colour, linewidth=3 if best else 1.3, zorder=3 if best else 2)
    for position, (key, scale) in enumerate(zip(keys, scales, strict=True)):
        _axis(axes, position, key, scale.ticks())
    _axis(axes, len(keys), monitor, [(share, f"{low + share * (high - low):.4g}") for share in (0, 0.25, 0.5, 0.75, 1)])
    axes.set(xlim=(-0.3, len(keys) + 0.55), ylim=(-0.05, 1.12))
    axes.set_axis_off()
    others = sum(not row.values for row in rows)
    grey = f"; {others} pruned or failed in grey" if others else ""
    figure.suptitle(f"{len(done)} trials, the best of {monitor} thick{grey}", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def _heights(row: Row, keys: Sequence[str], scales: Sequence[_Scale]) -> list[float]:
    return [scale(row.parameters.get(key, "")) for key, scale in zip(keys, scales, strict=True)]


def _axis(axes: Axes, position: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([position, position], [0, 1], color="0.3", linewidth=1, zorder=4)
    axes.text(position, 1.06, name, ha="center", va="bottom", fontsize=9, fontweight="bold")
    for height, text in ticks:
        box: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
        axes.plot([position - 0.02, position], [height, height], color="0.3", linewidth=1, zorder=4)
        axes.text(position + 0.03, height, text, ha="left", va="center", fontsize=8, bbox=box, zorder=5)


class _Scale:
    """Where the values of one key lie on its axis, from 0 to 1."""

    def __init__(self, texts: Sequence[str], log: bool | None) -> None:
        numbers = _numbers(texts)
        self.names = sorted(set(texts)) if numbers is None else []
        self.numbers = sorted(set(numbers or ()))
        self.log = False
        if numbers is not None:
            positive = min(numbers) > 0
            self.log = positive and (max(numbers) > 20 * min(numbers) if log is None else log)
            self.low, self.high = self._place(min(numbers)), self._place(max(numbers))

    def _place(self, number: float) -> float:
        return math.log10(number) if self.log else number

    def __call__(self, text: str) -> float:
        if self.names:
            return self.names.index(text) / max(1, len(self.names) - 1)
        return (self._place(float(text)) - self.low) / ((self.high - self.low) or 1)

    def ticks(self) -> list[tuple[float, str]]:
        if self.names:
            shown = self.names[:: max(1, len(self.names) // NOMINAL_LIMIT)]
            return [(self(name), name if len(name) <= 24 else f"{name[:23]}…") for name in shown]
        if len(self.numbers) <= TICKS:
            return [(self(repr(number)), f"{number:.4g}") for number in self.numbers]
        places = [self.low + share * (self.high - self.low) for share in (0, 0.25, 0.5, 0.75, 1)]
        return [(i / 4, f"{10**place if self.log else place:.3g}") for i, place in enumerate(places)]


def _is_log(space: Space | None, key: str) -> bool | None:
    """Say whether a key was searched on a logarithmic scale; ``None`` where nobody said."""
    dimension = None if space is None else space.dimensions.get(key)
    return dimension.log if isinstance(dimension, Interval) else None


def _bars(path: Path, shares: dict[str, float], monitor: str, trials: int) -> Path:
    """Draw a bar per key, the largest on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.3 + 0.42 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    bars = axes.barh(names, [shares[name] for name in names], color="#3b6ea5", height=0.65)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(f"share of the variance of {monitor} that a key explains alone ({trials} trials)", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
