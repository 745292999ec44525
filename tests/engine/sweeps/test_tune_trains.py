"""Searches in which models are trained: over two processes per trial, and killed in the middle of a trial."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from detseg.durable import read_sealed
from shared import REPO

SMALL = ["data.image_size=64", "data.train_images=8", "data.val_images=4", "data.batch_size=2", "data.num_workers=0"]
SHORT = ["callbacks.images=null", "trainer.log_every_n_steps=1", "name=study", "model=fcos_small"]
LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "tests")}


def command(*overrides: str) -> list[str]:
    return [str(Path(sys.executable).with_name("detseg")), "tune", *SMALL, *SHORT, LR, *overrides]


def trials(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_both_ranks_of_every_trial_have_one_config_and_one_directory(tmp_path: Path):
    """Issue 3, item 7 [different rates in one group, exit 0]."""
    notes = "+callbacks.notes={_target_:rank_notes.RankNotes,dirpath:'${paths.output_dir}'}"
    typed = command("trainer=ddp_cpu", "trainer.max_epochs=1", "tune.trials=2", notes, "allow=[rank_notes]")
    done = subprocess.run(typed, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr + done.stdout
    (study,) = tmp_path.glob("runs/*/*")
    rows = trials(study)
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert {path.name for path in study.iterdir() if path.is_dir()} == {row["directories"] for row in rows}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "a stray folder"
    for row in rows:
        place = study / row["directories"]
        first, second = (json.loads((place / f"rank_{rank}.json").read_text()) for rank in range(2))
        assert first == second and first["world"] == 2
        assert first["config"]["optimizer"]["lr"] == float(row["optimizer.lr"])
        written = yaml.safe_load((place / "resolved.yaml").read_text())
        assert written["optimizer"]["lr"] == float(row["optimizer.lr"])
        stamp = json.dumps(read_sealed(place / "checkpoints" / "last.ckpt")["detseg"], default=str)
        assert row["optimizer.lr"] in stamp
    assert rows[0]["optimizer.lr"] != rows[1]["optimizer.lr"]


@pytest.mark.slow
def test_a_trial_that_was_killed_with_its_study_goes_on_from_its_checkpoint(tmp_path: Path):
    typed = command("trainer=cpu", "trainer.max_epochs=4", "tune.trials=1", "resume=auto")
    process = subprocess.Popen(
        typed, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 240
    try:
        while not list(tmp_path.glob("runs/*/*/*/checkpoints/last.ckpt")) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (directory,) = tmp_path.glob("runs/*/*/*/")
    killed = not (directory / "trial.json").exists()
    done = subprocess.run(typed, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr + done.stdout
    (row,) = trials(directory.parent)
    assert row["state"] == "complete" and row["directories"] == directory.name
    assert "was under way: it goes on" in done.stdout
    log = (directory / "train.log").read_text()
    assert killed and "going on from" in log and "goes on with" not in log, "nothing but the place has changed"
    assert [log.count(f"epoch {epoch}/4") for epoch in (1, 4)] == [1, 1], "an epoch was trained again"
    assert read_sealed(directory / "checkpoints" / "last.ckpt")["global_step"] == 16
