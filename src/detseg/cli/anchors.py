"""What ``detseg anchors`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from detseg.cli.show import number
from detseg.engine.anchors import Anchors


def show_anchors(found: Anchors, console: Console | None = None) -> None:
    """Print two tables, the override that uses the anchors, and where all lies.

    Args:
        found: what the verb left behind.
        console: default: standard output.
    """
    console = Console(soft_wrap=True) if console is None else console
    console.print(anchor_table(found))
    console.print(count_table(found))
    console.print(f"{found.boxes} boxes, mean IoU with the best of these anchors {found.mean_iou:.4f}", highlight=False)
    console.print(f"'{found.override}'", highlight=False, markup=False)
    for path in [found.directory, *found.files]:
        console.print(f"{'run' if path == found.directory else path.stem:<12}{path}", highlight=False)


def anchor_table(found: Anchors) -> Table:
    """Return one row per anchor: its level, width and height in pixels."""
    table = Table(title="anchors", title_justify="left")
    for name in ("level", "width", "height"):
        table.add_column(name, justify="right")
    for level, sizes in enumerate(found.sizes):
        for width, height in sizes:
            table.add_row(str(level), f"{width:g}", f"{height:g}")
    return table


def count_table(found: Anchors) -> Table:
    """Return the mean IoU for each number of anchors, before they are rounded."""
    table = Table(title="what more anchors cover", title_justify="left")
    for name in ("anchors", "mean IoU"):
        table.add_column(name, justify="right")
    for count, value in found.by_count.items():
        table.add_row(str(count), number(value))
    return table
