"""The order of the papers: accuracy of trained runs against images per second on single photos, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from history_two_stage import Row, measure
from omegaconf import OmegaConf
from side_by_side.turns import markdown

from detseg.config import load_config
from detseg.models import available

FAMILIES = {
    "TwoStageDetection": "two-stage",
    "OneStageDetection": "one-stage",
    "AnchorFreeDetection": "anchor-free",
}
HEAD = ("system", "family", "year", "AP50", "AP", "images/s", "million parameters", "epochs x images")


class Experiment(NamedTuple):
    """One experiment of ``conf`` that finds boxes."""

    name: str
    family: str
    year: int


def experiments(data: str) -> list[Experiment]:
    """Return those on a data set, family by family and in each by year, as ``conf`` and the papers' headers say."""
    years = {card.name: card.year for card in available()}
    found = []
    for path in sorted((Path(__file__).parents[2] / "conf" / "experiment").glob(f"{data}_*.yaml")):
        cfg = load_config(f"experiment={path.stem}")
        family = FAMILIES.get(cfg.task["_target_"].rpartition(".")[2])
        if family:
            model = next(text.split()[-1] for text in path.read_text().splitlines() if "override /model:" in text)
            found.append(Experiment(path.stem, family, years[model]))
    order = list(FAMILIES.values())
    return sorted(found, key=lambda own: (order.index(own.family), own.year, own.name))


def table(folder: Path, data: str, images: int) -> str:
    """Return the rows of all experiments with a finished run at ``folder/<experiment>/*/*/metrics.json``.

    Args:
        folder: where ``benchmarks/learning.py`` or ``history_two_stage.py`` keep their runs.
        data: the experiments' first word, such as ``orchard``.
        images: validation images that are timed, one by one.
    """
    rows, missing, budgets = [], [], set()
    for own in experiments(data):
        runs = sorted((folder / own.name).glob("*/*/metrics.json"))
        if not runs:
            missing.append(own.name)
            continue
        cfg = OmegaConf.load(runs[-1].with_name("resolved.yaml"))
        budget = f"{cfg.trainer.max_epochs} x {cfg.data.get('train_images', 'all')}"
        budgets.add(budget)
        rows.append(_cells(own, measure(own.name, folder / own.name, images), budget))
    lines = [markdown(HEAD, rows)] if rows else ["No finished run was found."]
    lines += ["", f"Budgets: {'equal' if len(budgets) < 2 else 'NOT equal'}."]
    return "\n".join(lines + ([f"Without a finished run: {', '.join(missing)}."] if missing else []))


def _cells(own: Experiment, row: Row, budget: str) -> list[str]:
    figures = ["n/a" if (value := row.figures.get(name)) is None else f"{value:.3f}" for name in ("map_50", "map")]
    return [own.name, own.family, str(own.year), *figures, f"{1 / row.total:.1f}", f"{row.parameters:.2f}", budget]
