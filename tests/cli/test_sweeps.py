"""``detseg train -m`` and ``detseg tune`` as they are typed, with trials that train nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import detseg.experiment
from detseg.cli.verbs import run_verb
from detseg.experiment import Outcome


@pytest.fixture
def trained(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories of the runs that were trained; the figure falls with the learning rate and rises with the seed."""
    directories: list[Path] = []

    def train(cfg) -> Outcome:
        directory = Path(cfg.paths.output_dir)
        directories.append(directory)
        if cfg.optimizer.lr > 0.5:
            raise FloatingPointError("the loss is NaN")
        figures = {"map": 1 - cfg.optimizer.lr + 0.01 * cfg.seed}
        (directory / "resolved.yaml").write_text("{}")
        (directory / "metrics.json").write_text(json.dumps(figures))
        return Outcome(directory=directory, figures=figures, monitor="map")

    monkeypatch.setattr(detseg.experiment, "train", train)
    return directories


def sweep(in_tmp: Path) -> tuple[Path, list[dict[str, str]]]:
    (path,) = in_tmp.glob("runs/*/*/sweep.csv")
    with path.open() as file:
        return path.parent, list(csv.DictReader(file))


def test_a_sweep_ends_with_its_table(trained: list[Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    assert run_verb("train", ["-m", "trainer=cpu", "optimizer.lr=0.1,0.2", "seed=1,2"]) == 0
    text = capsys.readouterr().out
    directory, rows = sweep(in_tmp)
    assert len(trained) == 4 and [row["seeds"] for row in rows] == ["1 2", "1 2"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.915, 0.815])
    assert "detseg train trainer=cpu optimizer.lr=0.1\n" in text and "0.9150" in text and "0.0071" in text
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == [
        f"optimizer.lr={lr},seed={seed}" for lr in (0.1, 0.2) for seed in (1, 2)
    ]
    assert (directory / "parallel_coordinates.png").stat().st_size > 10_000


def test_a_trial_that_fails_is_in_the_table_and_the_sweep_fails(
    trained: list[Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_verb("train", ["-m", "trainer=cpu", "optimizer.lr=0.9,0.1"]) == 1
    said = capsys.readouterr()
    _, rows = sweep(in_tmp)
    assert [row["state"] for row in rows] == ["failed", "complete"] and rows[0]["error"] == "the loss is NaN"
    assert "2 trials: 1 complete, 1 failed" in said.out and "the loss is NaN" in said.err


@pytest.mark.parametrize("varied", ["callbacks=default,[default]", "optimizer.lr=0.002,2e-3"])
def test_twins_are_refused_and_named(
    varied: str, trained: list[Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_verb("train", ["-m", "trainer=cpu", varied, "seed=1,2"]) != 0
    error = capsys.readouterr().err
    assert "have the same resolved config" in error and "the trials 0 (" in error and "and 2 (" in error
    assert len(trained) == 2, "each once"
    assert [row["seeds"] for row in sweep(in_tmp)[1]] == ["1 2"]


def test_an_unfinished_sweep_goes_on_and_its_finished_trials_stay(
    trained: list[Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
):
    train = detseg.experiment.train
    typed = ["-m", "trainer=cpu", "optimizer.lr=0.1,0.2,0.3"]

    def killed(cfg) -> Outcome:
        if len(trained) == 2:
            raise SystemExit(143)
        return train(cfg)

    monkeypatch.setattr(detseg.experiment, "train", killed)
    assert run_verb("train", typed) == 143
    monkeypatch.setattr(detseg.experiment, "train", train)
    assert run_verb("train", [*typed, "resume=auto"]) == 0
    _, rows = sweep(in_tmp)
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.91, 0.81, 0.71])
    assert len(trained) == 3, "what was finished is not trained again"


def test_tune_says_what_it_is_given_wrongly(in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    assert run_verb("tune", ["--help"]) == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage: detseg tune") and "trials: 20" in help_text
    assert run_verb("tune", ["-m", "seed=1,2"]) == 2
    assert "detseg tune takes key=value and --help, not -m" in capsys.readouterr().err
    assert run_verb("tune", ["optimizer.lr=0.1"]) == 2
    assert "nothing is searched" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


def test_the_flag_may_stand_anywhere(trained: list[Path], in_tmp: Path):
    for command in (["optimizer.lr=0.1,0.2", "trainer=cpu", "-m"], ["optimizer.lr=0.1,0.2", "-m", "trainer=cpu"]):
        assert run_verb("train", command) == 0
    assert len(trained) == 4 and {path.name for path in trained} == {"optimizer.lr=0.1", "optimizer.lr=0.2"}
