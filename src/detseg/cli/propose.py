"""What ``detseg propose`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from detseg.cli.show import number
from detseg.engine.propose import Proposed, SplitProposals


def show_proposals(proposed: Proposed, console: Console | None = None) -> None:
    """Print tables, then where all lies.

    Args:
        proposed: what the verb left behind.
        console: default: standard output.
    """
    console = Console(soft_wrap=True) if console is None else console
    console.print(proposed.maker, highlight=False)
    console.print(work_table(proposed.splits))
    console.print(recall_table(proposed.splits))
    for place in dict.fromkeys(one.place for one in proposed.splits):
        console.print(f"{'proposals':<16} {place or 'kept nowhere: no folder could be written'}", highlight=False)
    for path in [proposed.directory, *proposed.files]:
        console.print(f"{'run' if path == proposed.directory else path.stem:<16} {path}", highlight=False)


def work_table(splits: list[SplitProposals]) -> Table:
    """Return one row per split: images, how many were made now, proposals and seconds per image.

    Seconds are of one process; a dash where nothing was left to be made.
    """
    table = Table(title="proposals", title_justify="left")
    table.add_column("split")
    for name in ("images", "made now", "proposals/image", "s/image"):
        table.add_column(name, justify="right")
    for one in splits:
        work = one.filling
        seconds = f"{work.seconds / work.made:.3f}" if work.made else "-"
        table.add_row(one.split, str(work.images), str(work.made), f"{one.boxes:.1f}", seconds)
    return table


def recall_table(splits: list[SplitProposals]) -> Table:
    """Return one row per split and limit: recall at IoU 0.5, and averaged over IoU 0.5 to 0.95."""
    table = Table(title="recall", title_justify="left")
    for name in ("split", "first proposals", "at IoU 0.5", "average (AR)"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for one in splits:
        limits = [name.removeprefix("recall_50_") for name in one.figures if name.startswith("recall_50_")]
        for limit in limits:
            recall, average = one.figures[f"recall_50_{limit}"], one.figures[f"ar_{limit}"]
            table.add_row(one.split, limit, number(recall), number(average), end_section=limit == limits[-1])
    return table
