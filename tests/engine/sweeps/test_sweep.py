"""Tables, files and pictures of sweeps, from numbers known beforehand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from detseg.cli.sweeps import show_summary
from detseg.config import ConfigError, load_config
from detseg.engine.sweeps.charts import draw_sweep, importance
from detseg.engine.sweeps.record import RECORD, TrialRecord, write_record
from detseg.engine.sweeps.space import read_space
from detseg.engine.sweeps.sweep import Row, conclude, group, run_trial, summarise
from detseg.experiment import Outcome


def record(value: float | None, seed: int = 1, directory: str = "", **parameters: str) -> TrialRecord:
    error = None if value is not None else "boom"
    return TrialRecord(
        parameters={"trainer": "cpu", **parameters, "seed": str(seed)},
        seed=seed,
        monitor="val/map",
        mode="max",
        state="failed" if value is None else "complete",
        value=value,
        error=error,
        seconds=1.5,
        directory=directory,
    )


def row(number: int, value: float | None, **parameters: str) -> Row:
    values = () if value is None else (value,)
    return Row(number=number, parameters=parameters, state="complete" if values else "pruned", values=values)


def test_seeds_of_one_set_are_one_row():
    rows, fixed = group(
        [record(0.4, 1, lr="0.1"), record(0.6, 2, lr="0.1"), record(0.3, 1, lr="1"), record(None, 2, lr="1")]
    )
    assert fixed == ["trainer=cpu"]
    assert [r.parameters for r in rows] == [{"lr": "0.1"}, {"lr": "1"}]
    assert rows[0].mean == pytest.approx(0.5) and rows[0].spread == pytest.approx(math.sqrt(0.02))
    assert rows[0].seeds == (1, 2) and rows[0].seconds == 3.0
    assert rows[1].state == "complete" and rows[1].values == (0.3,) and rows[1].error == "boom"
    assert math.isnan(rows[1].spread)


def test_one_seed_belongs_to_the_command_and_several_do_not():
    assert group([record(0.4, 7, lr="0.1"), record(0.6, 7, lr="1")])[1] == ["trainer=cpu", "seed=7"]
    rows, fixed = group([record(0.4, 1), record(0.6, 2)])
    assert fixed == ["trainer=cpu"] and len(rows) == 1 and rows[0].parameters == {}


def test_the_best_comes_first_and_its_line_can_be_pasted(tmp_path: Path):
    rows = [row(0, 0.2, model="a b"), row(1, None, model="c"), row(2, 0.9, model="[d,e]"), row(3, 0.5, model="f")]
    high = conclude(tmp_path, rows, name="sweep", monitor="val/map", mode="max", fixed=["trainer=cpu"])
    assert [r.number for r in high.rows] == [2, 3, 0, 1] and high.best is rows[2]
    assert high.command == "detseg train trainer=cpu 'model=[d,e]'"
    low = conclude(tmp_path, rows, name="sweep", monitor="val/loss", mode="min")
    assert [r.number for r in low.rows] == [0, 3, 2, 1] and low.command == "detseg train 'model=a b'"
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["trial"] for line in lines] == ["0", "1", "2", "3"]
    assert [line["mean"] for line in lines] == ["0.2", "", "0.9", "0.5"] and lines[2]["model"] == "[d,e]"
    assert conclude(tmp_path, rows[1:2], name="x", monitor="m", mode="max").best is None


def test_the_table_shows_mean_and_spread_and_why_there_is_none(tmp_path: Path):
    rows = [
        Row(number=0, parameters={"lr": "0.1"}, state="complete", values=(0.5, 0.7), seeds=(1, 2)),
        Row(number=1, parameters={"lr": "0.00012345678"}, state="failed", error="CUDA out of memory"),
    ]
    summary = conclude(tmp_path, rows, name="sweep", monitor="val/map", mode="max")
    console = Console(record=True, width=120)
    show_summary(summary, console)
    text = console.export_text()
    assert "0.6000" in text and "0.1414" in text and "failed: CUDA out of memory" in text and "0.0001235" in text
    assert "2 trials: 1 complete, 1 failed" in text and "detseg train lr=0.1" in text


def test_a_key_that_decides_all_explains_all_and_one_without_effect_nothing():
    rows = [
        row(i, (lr - 3) ** 2 + 0.01 * (i % 2), lr=str(lr), model="ab"[j], depth=str(i % 2))
        for i, (lr, j) in enumerate((lr, j) for lr in range(1, 7) for j in range(2))
    ]
    shares = importance(rows, ["lr", "model", "depth"])
    assert next(iter(shares)) == "lr" and shares["lr"] > 0.999
    assert shares["model"] == 0.0 and shares["depth"] == 0.0


def test_importance_by_hand_for_two_groups():
    """Means 1 and 3 of two rows each, residuals 0.5: adjusted R^2 = 1 - (1 / 2) / (5 / 3)."""
    rows = [row(0, 0.5, m="a"), row(1, 1.5, m="a"), row(2, 2.5, m="b"), row(3, 3.5, m="b")]
    assert importance(rows, ["m"]) == {"m": pytest.approx(1 - (1 / 2) / (5 / 3))}
    assert importance(rows[:2], ["m"]) == {}, "one value tells nothing"
    assert importance([row(i, float(i), m="abc"[i]) for i in range(3)], ["m"]) == {}, "each row a name of its own"


def test_pictures_are_drawn_where_there_is_something_to_see(tmp_path: Path):
    space = read_space(["lr=tag(log,interval(0.001,1))", "model=choice(a,b)"])
    rows = [row(i, 0.1 * i if i != 3 else None, lr=str(0.001 * 2**i), model="ab"[i % 2]) for i in range(8)]
    paths = draw_sweep(tmp_path, rows, monitor="val/map", mode="max", space=space)
    assert [path.name for path in paths] == ["parallel_coordinates.png", "importance.png"]
    for path in paths:
        pixels = Image.open(path).convert("RGB")
        assert pixels.width >= 900 and len(pixels.getcolors(1 << 20)) > 20
    assert draw_sweep(tmp_path / "x", rows[:1], monitor="val/map", mode="max") == []
    assert draw_sweep(tmp_path / "x", [row(i, 0.1 * i) for i in range(3)], monitor="val/map", mode="max") == []


def test_a_trial_of_a_sweep_is_recorded_and_its_twin_refused(tmp_path: Path):
    def train(cfg) -> Outcome:
        Path(cfg.paths.output_dir).mkdir(parents=True, exist_ok=True)
        if cfg.optimizer.lr > 1:
            raise FloatingPointError("too large")
        return Outcome(directory=Path(cfg.paths.output_dir), figures={"map": 1 - cfg.optimizer.lr}, monitor="map")

    def go(name: str, lr: str) -> Outcome:
        typed = ["trainer=cpu", f"optimizer.lr={lr}", "hydra.job.num=1"]
        cfg = load_config(*typed[:2], f"paths.output_dir={tmp_path / name}")
        return run_trial(cfg, train=train, overrides=typed, sweep=tmp_path, number="abcd".index(name))

    assert go("a", "0.1").figures == {"map": 0.9} and go("b", "0.3").figures == {"map": 0.7}
    with pytest.raises(ConfigError, match=r"the trials 0 \(a\) and 2 \(c\) have the same resolved config"):
        go("c", "1e-1")
    with pytest.raises(FloatingPointError, match="too large"):
        go("d", "3.0")
    assert summarise(tmp_path / "empty") is None
    summary = summarise(tmp_path)
    assert summary is not None and [r.state for r in summary.rows] == ["complete", "complete", "failed"]
    assert summary.command == "detseg train trainer=cpu optimizer.lr=0.1" and summary.failed == 1
    assert summary.rows[2].error == "too large"
    assert (tmp_path / "sweep.csv").is_file() and not (tmp_path / "a" / "hydra").exists()


def test_a_run_that_a_signal_ended_has_no_record(tmp_path: Path):
    def train(cfg) -> Outcome:
        raise SystemExit(143)

    cfg = load_config("trainer=cpu", f"paths.output_dir={tmp_path / 'a'}")
    with pytest.raises(SystemExit):
        run_trial(cfg, train=train, overrides=[], sweep=tmp_path, number=0)
    assert not (tmp_path / "a" / RECORD).exists() and summarise(tmp_path) is None
    write_record(tmp_path / "a.json", record(0.5, lr="1"))
    assert (tmp_path / "a.json").read_text().startswith("{")


def test_different_figures_are_not_ranked(tmp_path: Path):
    for model, figure, value in (("fcos_small", "val/map", 0.2), ("unet_small", "val/miou", 0.9)):
        (directory := tmp_path / f"model={model}").mkdir()
        begun = TrialRecord(parameters={"model": model}, seed=1, monitor=figure, mode="max")
        write_record(directory / RECORD, begun.finished({figure.partition("/")[2]: value}, seconds=1.0))
    summary = summarise(tmp_path)
    assert summary is not None and summary.best is None and summary.monitor == "val/map or val/miou"
    assert summary.command is not None and summary.command.startswith("none: val/map and val/miou cannot be compared")
    assert sorted(row.mean for row in summary.rows) == [0.2, 0.9]
    assert [path.name for path in summary.files] == ["sweep.csv"]
