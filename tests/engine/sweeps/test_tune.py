"""The search as a whole: killed, resumed, with trials that crash; and what its options do."""

from __future__ import annotations

import csv
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

import stub_study
from detseg.config import ConfigError
from detseg.engine.sweeps.study import Request, locate
from detseg.engine.sweeps.tune import VOID, Search, tune
from shared import REPO

LR = "optimizer.lr=tag(log,interval(1e-5,1e-1))"
CPU = ("trainer=cpu", "name=study")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    multiprocessing.forkserver._forkserver._stop()


def trials(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 120.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def storage(study: Path) -> optuna.Study:
    """Return the study as its storage has it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = json.loads((study / "study.json").read_text())["name"]
    return optuna.load_study(study_name=name, storage=f"sqlite:///{study / 'study.db'}")


def stored(study: Path) -> dict[int, tuple[str, float | None]]:
    """Return state and value of the ended trials."""
    found = storage(study).trials
    return {trial.number: (trial.state.name, trial.value) for trial in found if trial.state.is_finished()}


def void_trials(study: Path) -> set[int]:
    """Return the numbers of the trials that a kill left without values."""
    return {trial.number for trial in storage(study).trials if trial.user_attrs.get("error") == VOID}


@pytest.mark.slow
def test_three_kills_and_three_crashes_lose_nothing(tmp_path: Path):
    """Issue 3, item 7."""
    settings = ["tune.trials=20", "tune.workers=2", "tune.prune_after_trials=3", "tune.startup=6", "resume=auto"]
    command = [sys.executable, str(REPO / "tests" / "stub_study.py"), *CPU, LR, *settings]
    environment = os.environ | {"STUB_CRASHES": "1", "PYTHONPATH": str(REPO / "tests")}
    kept: dict[int, tuple[str, float | None]] = {}
    for ended in (4, 9, 14):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
        try:
            assert wait_until(lambda ended=ended: len(list(tmp_path.glob("runs/*/*/*/trial.json"))) >= ended)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        (study,) = tmp_path.glob("runs/study/*")
        pids = [int(path.read_text()) for path in study.glob("*/pid")]
        assert wait_until(lambda pids=pids: not any(map(alive, pids)), 20), "a trial outlived its study"
        now = stored(study)
        assert kept.items() <= now.items(), "a finished trial was lost or changed"
        kept = now
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/study/*"))) == 1, "the same command with resume=auto is the same study"
    check_searched(study, kept)


def check_searched(study: Path, kept: dict[int, tuple[str, float | None]]) -> None:
    rows = trials(study)
    assert kept.items() <= stored(study).items()
    void = void_trials(study)  # a kill between the number and its values leaves one, which tried nothing
    assert len(void) <= 3, "one per kill"
    assert [int(row["trial"]) for row in rows] == [number for number in range(20 + len(void)) if number not in void]
    failed = {int(row["trial"]): row["error"] for row in rows if row["state"] == "failed"}
    said = {3: "planted: the loss went to the moon", 8: "killed by SIGKILL", 12: "ended with exit code 3"}
    assert set(failed) == set(stub_study.CRASHES) - void
    assert all(error.startswith(said[number]) for number, error in failed.items())
    assert failed.get(3, said[3]) == said[3], "the whole of it, in one line"
    states = [row["state"] for row in rows]
    assert states.count("pruned") > 0
    assert states.count("complete") == 20 - len(failed) - states.count("pruned")
    best = max(float(row["mean"]) for row in rows if row["mean"])
    assert best > 0.99, "the best there is, 1, was not found to within a hundredth"
    directories = {path.name for path in study.iterdir() if path.is_dir()}
    assert directories == {row["directories"] for row in rows}, "a directory that belongs to no trial"
    for row in rows:
        notes = study / row["directories"] / "epochs"
        if row["state"] in ("complete", "pruned"):
            epochs = [int(line) for line in notes.read_text().split()]
            assert epochs == list(range(1, len(epochs) + 1)), "an epoch was trained twice or skipped"
            assert row["state"] == "pruned" or len(epochs) == stub_study.EPOCHS


@pytest.mark.slow
def test_slurm_queues_a_study_again_once_and_it_goes_on(tmp_path: Path):
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/calls\n")
    fake.chmod(0o755)
    command = [sys.executable, str(REPO / "tests" / "stub_study.py"), *CPU, LR, "tune.trials=6", "tune.pruner=none"]
    slurm = {"SLURM_JOB_ID": "4711", "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    environment = os.environ | slurm | {"PYTHONPATH": str(REPO / "tests")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: list(tmp_path.glob("runs/*/*/*/trial.json")))
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    (study,) = tmp_path.glob("runs/study/*")
    assert (tmp_path / "calls").read_text() == "requeue 4711\n" and not Request.read(study).finished
    before = stored(study)
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/study/*")) == [study] and Request.read(study).finished
    assert before.items() <= stored(study).items() and len(stored(study)) == 6


@pytest.mark.slow
def test_sigterm_leaves_a_study_to_go_on_with(tmp_path: Path):
    command = [sys.executable, str(REPO / "tests" / "stub_study.py"), *CPU, LR, "tune.trials=6", "tune.pruner=none"]
    environment = os.environ | {"PYTHONPATH": str(REPO / "tests")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: list(tmp_path.glob("runs/*/*/*/trial.json")))
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    (study,) = tmp_path.glob("runs/study/*")
    assert process.returncode == 143 and f"detseg tune resume={Path('runs/study') / study.name} goes on" in output
    assert not Request.read(study).finished and 1 <= len(stored(study)) < 6
    before = stored(study)
    again = [*command[:2], f"resume={study}", "tune.trials=4"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert before.items() <= stored(study).items() and len(stored(study)) == max(4, len(before) + 1)
    assert Request.read(study).finished


@pytest.mark.slow
def test_equal_configs_are_an_alarm_and_their_value_is_taken_over(in_tmp: Path, caplog: pytest.LogCaptureFixture):
    """Runs that differ in their names alone."""
    varied = ["name=choice(a,b)", "optimizer.lr=choice(0.001,0.01)"]
    summary = tune("trainer=cpu", *varied, "tune.sampler=grid", objective=stub_study.objective)
    rows = sorted(summary.rows, key=lambda row: row.number)
    assert [row.twin for row in rows] == [None, None, 0, 1]
    assert [row.mean for row in rows] == [1.0, 0.9, 1.0, 0.9] and {row.state for row in rows} == {"complete"}
    assert "trial 2" in caplog.text and "has the resolved config of trial 0: its value is taken" in caplog.text
    assert len(list(summary.directory.glob("*/trial.json"))) == 2, "a twin was trained"
    assert summary.best is not None and summary.best.number == 0


@pytest.mark.slow
def test_seeds_are_runs_of_one_trial_and_its_value_their_mean(in_tmp: Path):
    summary = tune(
        *CPU, "optimizer.lr=choice(0.001,0.01)", "tune.seeds=[1,2,3]", "tune.sampler=grid", "tune.workers=2",
        objective=stub_study.objective,
    )  # fmt: skip
    assert [row.number for row in summary.rows] == [0, 1]
    best = summary.rows[0]
    assert best.seeds == (1, 2, 3) and best.values == pytest.approx((1.0, 1.001, 1.002))
    assert best.mean == pytest.approx(1.001) and best.spread == pytest.approx(0.001)
    assert best.directories == tuple(f"optimizer.lr=0.001,seed={seed}" for seed in (1, 2, 3))
    assert all((summary.directory / name / "trial.json").is_file() for name in best.directories)
    assert summary.command == "detseg train trainer=cpu name=study optimizer.lr=0.001"
    assert stored(summary.directory)[0] == ("COMPLETE", pytest.approx(1.001))
    (row, _) = trials(summary.directory)
    assert row["seeds"] == "1 2 3" and float(row["spread"]) == pytest.approx(0.001)


@pytest.mark.slow
def test_a_kill_while_values_are_drawn_costs_a_number_and_no_trial(in_tmp: Path):
    request, directory = locate([*CPU, LR, "tune.trials=3", "tune.pruner=none"])
    request.write(directory)
    ledger = Search(request=request, directory=directory, objective=stub_study.objective).ledger
    ledger.draw()
    ledger.study.ask()  # a number without values, as between two writes to the storage
    summary = tune(f"resume={directory}", objective=stub_study.objective)
    assert sorted(row.number for row in summary.rows) == [0, 2, 3] and void_trials(directory) == {1}
    assert {row.state for row in summary.rows} == {"complete"} and summary.failed == 0


@pytest.mark.slow
def test_a_study_of_failures_names_them_and_has_no_best(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    summary = tune(*CPU, LR, "tune.trials=2", "tune.monitor=val/nothing", objective=stub_study.objective)
    assert summary.best is None and summary.command is None and summary.failed == 2
    assert {row.error for row in summary.rows} == {"val/nothing has no value; figures of the run: map, other"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=0.1"], "nothing is searched"),
        ([LR, "model=choice(fcos_small,fcos_smal)"], "there is no model=fcos_smal"),
        (["optimiser.lr=interval(0.1,0.2)"], "no key 'optimiser.lr'. Did you mean optimizer.lr"),
        ([LR, "tune.trails=3"], "no key 'tune.trails'. Did you mean tune.trials"),
        (["tune.trials=1,2"], "nothing is searched"),
        (["seed=1,2", "tune.seeds=[1,2]"], "give one of them"),
        ([LR, "tune.sampler=grid"], "has no grid"),
        ([LR, "tune.pruner=hyperband"], "choose median or none"),
        (["model=choice(fcos_small,unet_small)"], r"different figures, val/map \(max\) and val/miou \(max\)"),
        ([LR, "sweep=lr"], "a search takes its own sweeps alone"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_written(overrides, message, in_tmp: Path):
    with pytest.raises(ConfigError, match=message):
        locate(overrides)
    assert list(in_tmp.iterdir()) == []


def test_a_study_keeps_its_space_and_lets_its_settings_change(in_tmp: Path):
    request, directory = locate([*CPU, LR, "tune.trials=3"])
    request.write(directory)
    assert locate([*CPU, LR, "resume=auto"])[1].resolve() == directory.resolve()
    again, same = locate([f"resume={directory}", "tune.trials=9"])
    assert same == directory and again.compose().tune.trials == 9 and again.overrides == (*CPU, LR)
    with pytest.raises(ConfigError, match=r"only tune\.\* may change"):
        locate([f"resume={directory}", "optimizer.lr=interval(0.1,0.2)"])
    with pytest.raises(FileNotFoundError, match="holds no study"):
        locate([f"resume={in_tmp}"])
    other = locate([*CPU, LR, "model=unet_small", "resume=auto"])[1]
    assert other != directory, "another command is another study"
