"""What a verb prints when it is done."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detseg.experiment import Outcome
from detseg.metrics import table_rows


def show(outcome: Outcome, console: Console | None = None) -> None:
    """Print the figures as tables, then where the run's files are.

    Args:
        outcome: what a verb left behind.
        console: default: standard output.
    """
    console = Console(soft_wrap=True) if console is None else console
    if outcome.figures:
        console.print(figure_table(outcome))
        classes = class_table(outcome)
        if classes is not None:
            console.print(classes)
    for name, place in {"checkpoint": outcome.checkpoint, "run": outcome.directory}.items():
        if place is not None:
            console.print(f"{name:<12}{place}", highlight=False)
    for path in outcome.files:
        console.print(f"{path.stem if path.suffix else path.name:<12}{path}", highlight=False)


def figure_table(outcome: Outcome) -> Table:
    """Return the figures over all classes; the one that the task optimises is marked."""
    table = Table(title="figures", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in table_rows({name: value for name, value in outcome.figures.items() if "/" not in name}):
        table.add_row(f"[bold]{name}[/bold]" if name == outcome.monitor else name, value)
    return table


def class_table(outcome: Outcome) -> Table | None:
    """Return one row per class with every figure that is measured per class, or ``None`` if there is none."""
    kinds = sorted({name.partition("/")[0] for name in outcome.figures if "/" in name})
    if not kinds:
        return None
    table = Table(title="per class", title_justify="left")
    table.add_column("class")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name in outcome.class_names:
        table.add_row(escape(name), *(number(outcome.figures.get(f"{kind}/{name}", math.nan)) for kind in kinds))
    return table


def number(value: float) -> str:
    """Return a figure with four decimals, ``n/a`` for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"
