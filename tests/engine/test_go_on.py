"""``resume=<run directory>`` and ``resume=auto``, as typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from detseg.checkpoint import load
from detseg.cli.main import main
from detseg.config import ConfigError, build, load_config
from detseg.engine.resume import held, is_running, requeued
from detseg.experiment import train, train_here

QUICK = [
    "trainer=cpu",
    "model=unet_small",
    "data.train_images=6",
    "data.val_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "scheduler=constant",
    "callbacks.images=null",
    "callbacks.curves=null",
]


def runs(directory: Path, name: str = "*") -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"runs/{name}/*/environment.json"))


def steps(run: Path) -> list[tuple[str, str]]:
    rows = csv.DictReader((run / "csv" / "metrics.csv").open())
    return [(row["step"], row["train/loss"]) for row in rows if row["train/loss"]]


def undo(run: Path) -> None:
    """Leave a run as a kill after its first epoch would."""
    keep = run / "checkpoints" / "last-1.ckpt"
    for path in [run / "metrics.json", *(run / "checkpoints").glob("*.ckpt")]:
        if path != keep:
            path.unlink()


class TestGoOn:
    def test_in_the_same_directory_with_what_was_typed_and_what_is_typed_now(
        self, in_tmp: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ):
        assert main(["train", *QUICK, "seed=5"]) == 0
        (run,) = runs(in_tmp)
        assert json.loads((run / "overrides.json").read_text()) == [*QUICK, "seed=5"]
        whole = steps(run)
        undo(run)
        assert main(["train", f"resume={run}"]) == 0
        assert runs(in_tmp) == [run] and (run / "metrics.json").exists()
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
        assert steps(run) == whole and len(whole) == 6
        assert yaml.safe_load((run / "resolved.yaml").read_text())["seed"] == 5
        assert main(["train", f"resume={run}", "trainer.max_epochs=3"]) == 0
        assert runs(in_tmp) == [run] and len(steps(run)) == 9
        assert "trainer.max_epochs=3, it was 2" in caplog.text + capsys.readouterr().out

    def test_auto_finds_the_unfinished_run_of_the_same_command(self, in_tmp: Path):
        assert main(["train", *QUICK, "resume=auto"]) == 0
        (first,) = runs(in_tmp)
        assert main(["train", *QUICK, "resume=auto"]) == 0, "the first has ended, so another begins"
        assert len(runs(in_tmp)) == 2
        undo(first)
        assert main(["train", *QUICK, "resume=auto", "seed=7"]) == 0, "another command"
        assert len(runs(in_tmp)) == 3 and not (first / "metrics.json").exists()
        with held(first):
            pass
        assert main(["train", *QUICK, "resume=auto"]) == 0
        assert len(runs(in_tmp)) == 3 and (first / "metrics.json").exists()

    def test_auto_in_a_sweep_leaves_out_what_has_ended(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        command = ["train", "-m", *QUICK, "seed=1,2", "resume=auto"]
        assert main(command) == 0
        trials = sorted(path.parent for path in in_tmp.glob("runs/*/*/*/metrics.json"))
        assert [trial.name for trial in trials] == ["seed=1", "seed=2"]
        first = (trials[0] / "metrics.json").stat().st_mtime_ns
        undo(trials[1])
        assert main(command) == 0
        again = sorted(path.parent for path in in_tmp.glob("runs/*/*/*/metrics.json"))
        assert again == trials and (trials[0] / "metrics.json").stat().st_mtime_ns == first
        assert len(steps(trials[1])) == 6
        noted = (sweep := trials[0].parent) / "overrides.json"
        typed = noted.read_text()
        assert main(["train", f"resume={sweep}", "-m"]) == 0  # the directory knows its command
        assert sorted(path.parent for path in in_tmp.glob("runs/*/*/*/metrics.json")) == trials
        assert noted.read_text() == typed and "seed=1,2" in typed
        assert main(["train", f"resume={sweep}"]) == main(["train", "-m", f"resume={trials[0]}"]) == 2

    def test_an_attempt_that_fails_leaves_the_run_as_it_was(
        self, in_tmp: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ):
        assert main(["train", *QUICK]) == 0
        (run,) = runs(in_tmp)
        names = ("overrides.json", "resolved.yaml", "environment.json", "metrics.json")
        before = {name: (run / name).read_text() for name in names}
        for wrong in (["model=fcos_small"], ["optimizer.lr=1e30", "trainer.gradient_clip_val=null"]):
            assert main(["train", f"resume={run}", "trainer.max_epochs=3", *wrong]) == 1
            assert {name: (run / name).read_text() for name in names} == before
        assert "does not fit the model" in (said := capsys.readouterr().err) and "the loss is nan" in said
        assert main(["train", f"resume={run}", "trainer.max_epochs=3"]) == 0
        assert len(steps(run)) == 9 and "trainer.max_epochs=3" in (run / "overrides.json").read_text()

    def test_a_new_rate_is_trained_with(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        assert main(["train", *QUICK, "optimizer.lr=1e-3"]) == 0
        (run,) = runs(in_tmp)
        assert main(["train", f"resume={run}", "trainer.max_epochs=3", "optimizer.lr=5e-4"]) == 0
        rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
        rates = [float(row["lr-AdamW/rest"]) for row in rows if row["lr-AdamW/rest"]]
        assert rates == pytest.approx([1e-3] * 6 + [5e-4] * 3)
        assert "going on with learning rate 0.0005, it was 0.001" in (run / "train.log").read_text() + caplog.text

    def test_a_run_that_was_moved_differs_in_nothing(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        assert main(["train", *QUICK]) == 0
        (run,) = runs(in_tmp)
        moved = run.rename(in_tmp / "elsewhere")
        assert main(["train", f"resume={moved}", "trainer.max_epochs=3"]) == 0
        told = caplog.text + (moved / "train.log").read_text()
        assert "trainer.max_epochs=3, it was 2" in told and "dirpath" not in told and len(steps(moved)) == 9

    def test_a_run_that_died_before_its_first_checkpoint_starts_anew(self, in_tmp: Path):
        assert main(["train", *QUICK, "trainer.max_epochs=1"]) == 0
        (run,) = runs(in_tmp)
        undo(run)
        assert not list((run / "checkpoints").glob("*.ckpt"))
        assert main(["train", f"resume={run}"]) == 0
        assert runs(in_tmp) == [run] and (run / "checkpoints" / "last.ckpt").exists()

    def test_a_damaged_checkpoint_is_passed_over(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        assert main(["train", *QUICK]) == 0
        (run,) = runs(in_tmp)
        whole, last = steps(run), run / "checkpoints" / "last.ckpt"
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        for name in ("last.ckpt", "best.ckpt"):
            (run / "checkpoints" / name).unlink()
            (run / "checkpoints" / name).write_bytes(content)
        assert main(["train", f"resume={run}"]) == 0
        assert f"passed over: {last} is damaged" in caplog.text + (run / "train.log").read_text()
        assert steps(run) == whole and len(whole) == 6
        assert torch.load(last, weights_only=True)["global_step"] == 6

    def test_where_all_checkpoints_are_damaged_nothing_starts_anew(
        self, in_tmp: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert main(["train", *QUICK, "trainer.max_epochs=1"]) == 0
        (run,) = runs(in_tmp)
        for path in (run / "checkpoints").glob("*.ckpt"):
            path.unlink()
            path.write_bytes(b"")
        before = (run / "csv" / "metrics.csv").read_text()
        assert main(["train", f"resume={run}"]) == 2
        assert "none of its checkpoints can be read (best.ckpt, last.ckpt)" in capsys.readouterr().err
        assert (run / "csv" / "metrics.csv").read_text() == before and (run / "resolved.yaml").exists()

    def test_a_branch_says_what_differs_from_its_checkpoint(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        assert main(["train", *QUICK]) == 0
        (run,) = runs(in_tmp)
        last = run / "checkpoints" / "last.ckpt"
        other = [text for text in QUICK if not text.startswith("data.batch_size")]
        assert (
            main(["train", f"resume={last}", "name=branch", *other, "data.batch_size=3", "trainer.max_epochs=3"]) == 0
        )
        (branch,) = runs(in_tmp, "branch")
        told = caplog.text + (branch / "train.log").read_text()
        assert "goes on with data.batch_size=3, it was 2" in told and "trainer.max_epochs=3, it was 2" in told
        assert "output_dir" not in told and "dirpath" not in told and " name=" not in told

    def test_a_directory_that_was_fitted_into_by_hand_is_not_trained_over(self, in_tmp: Path):
        cfg = load_config(*QUICK, "trainer.max_epochs=1")
        run = build(cfg)
        run.trainer.fit(run.task, run.data)
        best = Path(cfg.paths.output_dir) / "checkpoints" / "best.ckpt"
        written = best.stat().st_mtime_ns
        with pytest.raises(ConfigError, match="holds a run already"):
            train(cfg)
        assert best.stat().st_mtime_ns == written
        assert load(cfg.paths.output_dir).class_names == load(best).class_names, "a directory stands for its best"

    def test_a_notebook_goes_on_too(self, in_tmp: Path):
        outcome = train(load_config(*QUICK))
        undo(outcome.directory)
        again = train(load_config(f"resume={outcome.directory}"))
        assert again.directory == outcome.directory
        assert again.figures["miou"] == pytest.approx(outcome.figures["miou"], abs=0)

    def test_a_job_that_slurm_started_again_goes_on_with_its_own_run(
        self, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        """The same command is typed again, without ``resume``."""
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert main(["train", *QUICK]) == 0
        (run,) = runs(in_tmp)
        whole = steps(run)
        undo(run)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setenv("SLURM_JOB_ID", "4712")
        assert main(["train", *QUICK]) == 0
        assert len(runs(in_tmp)) == 2 and not (run / "metrics.json").exists(), "it is another job's"
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert main(["train", *QUICK]) == 0
        assert len(runs(in_tmp)) == 2 and steps(run) == whole
        assert f"started again by Slurm: going on in {run.relative_to(in_tmp)}" in "".join(capfd.readouterr())

    def test_so_does_a_sweep(self, in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
        command = ["train", "-m", *QUICK, "seed=1,2"]
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert main(command) == 0
        trials = sorted(path.parent for path in in_tmp.glob("runs/*/*/*/metrics.json"))
        undo(trials[1])
        first = (trials[0] / "metrics.json").stat().st_mtime_ns
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert main(command) == 0
        assert sorted(path.parent for path in in_tmp.glob("runs/*/*/*/metrics.json")) == trials
        assert (trials[0] / "metrics.json").stat().st_mtime_ns == first and len(steps(trials[1])) == 6

    def test_a_submitted_config_goes_on_in_a_job_that_slurm_started_again(
        self, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """``launcher=slurm``: nobody types anything, the workers read ``resolved.yaml`` once more."""
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        run = train(load_config(*QUICK)).directory
        whole = steps(run)
        undo(run)
        cfg = OmegaConf.load(run / "resolved.yaml")
        assert isinstance(cfg, DictConfig) and requeued(cfg) is cfg, "a first start"
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        assert requeued(cfg).resume == str(run / "checkpoints" / "last-1.ckpt") and cfg.resume is None
        assert train_here(cfg).directory == run and steps(run) == whole

    def test_says_what_cannot_be_gone_on_with(self, in_tmp: Path, capsys: pytest.CaptureFixture[str]):
        (in_tmp / "empty").mkdir()
        assert main(["train", "resume=empty"]) == 2
        assert "resume=empty: no run (there is no overrides.json)" in capsys.readouterr().err
        assert main(["train", "resume=nowhere"]) == 2
        assert "resume=nowhere: there is no such file" in capsys.readouterr().err


def test_a_directory_is_held_by_one_process(tmp_path: Path):
    import multiprocessing

    def hold(directory: Path, queue: Any) -> None:
        with held(directory):
            queue.put("held")
            queue.get()

    context = multiprocessing.get_context("fork")
    there, back = context.Queue(), context.Queue()

    class Both:
        put, get = staticmethod(back.put), staticmethod(there.get)

    process = context.Process(target=hold, args=(tmp_path, Both), daemon=True)
    process.start()
    try:
        assert back.get(timeout=30) == "held"
        assert is_running(tmp_path)
        with pytest.raises(ConfigError, match="another process trains there"), held(tmp_path):
            pass
        process.kill()
        process.join(10)
        assert not is_running(tmp_path), "however it ended"
    finally:
        process.kill()
