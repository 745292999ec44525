"""The verb ``detseg tune``, and the table with which every sweep ends."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detseg.config import ConfigError
from detseg.engine.sweeps.sweep import Row, Summary

SHOWN = 10
"""Rows of the table; all of them are in the CSV file."""


def tune(arguments: Sequence[str]) -> None:
    """Search as the arguments say and print what came out.

    Raises:
        ConfigError: a flag is given, or the search cannot start.
        SystemExit: a signal ended the study, or no trial came to its end (1).
    """
    from detseg.engine.sweeps.tune import tune as search

    flags = [text for text in arguments if text.startswith("-")]
    if flags:
        raise ConfigError(f"detseg tune takes key=value and --help, not {' '.join(flags)}; it sweeps by itself")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    summary = search(*arguments)
    show_summary(summary)
    if summary.best is None:
        raise SystemExit(1)


def sweep_end(directory: Path) -> None:
    """Write and print the summary of a sweep of ``detseg train -m``."""
    from detseg.engine.sweeps.sweep import summarise

    summary = summarise(directory)
    if summary is not None:
        show_summary(summary)


def show_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the table, the best line to type, and where everything is.

    Args:
        summary: of a sweep.
        console: default: standard output.
    """
    console = Console(soft_wrap=True) if console is None else console
    console.print(summary_table(summary))
    states = [row.state for row in summary.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"{len(states)} trials: {counts}", highlight=False)
    for name, place in {"best": summary.command, "sweep": summary.directory}.items():
        if place is not None:
            console.print(f"{name:<12}{escape(str(place))}", highlight=False)
    for path in summary.files:
        console.print(f"{'':<12}{path}", highlight=False)


def summary_table(summary: Summary) -> Table:
    """Return the best rows, then those without a value as far as there is room."""
    keys = list(dict.fromkeys(key for row in summary.rows for key in row.parameters))
    seeds = any(len(row.values) > 1 for row in summary.rows)
    table = Table(title=f"trials by {summary.monitor}", title_justify="left")
    table.add_column("trial", justify="right")
    for name in _short(keys):
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("mean" if seeds else summary.monitor, justify="right")
    if seeds:
        table.add_column("spread", justify="right")
        table.add_column("seeds", justify="right")
    for row in summary.rows[:SHOWN]:
        cells = [_parameter(row.parameters.get(key, "")) for key in keys]
        figures = [_value(row), *([_figure(row.spread), str(len(row.values))] if seeds else [])]
        style = "bold" if row is summary.best else None
        table.add_row(str(row.number), *cells, *figures, style=style)
    if len(summary.rows) > SHOWN:
        table.caption = f"{len(summary.rows) - SHOWN} more in the CSV file"
    return table


def _short(keys: Sequence[str]) -> list[str]:
    """Return the keys' last parts where those tell them apart, else the keys."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for end, key in zip(ends, keys, strict=True)]


def _parameter(text: str) -> str:
    """Return a value as typed; a long number with four digits."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else escape(text)
    except ValueError:
        return escape(text)


def _value(row: Row) -> str:
    """Return the figure, or why there is none."""
    if row.state == "complete":
        return _figure(row.mean)
    error = "" if row.error is None else f": {row.error}"
    return escape(f"{row.state}{error}"[:60])


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
