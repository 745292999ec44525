"""Which checkpoints a run keeps, and that none is ever worse than what was there."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import detseg
from detseg.callbacks import EMA, Checkpoint, DurableIO
from detseg.callbacks.durable_io import check_finite, non_finite, previous_of
from detseg.checkpoint import check_resume, init_from, read_checkpoint
from detseg.cli.main import main
from detseg.durable import WriteFailed, check_seal, newest_valid, write_sealed
from detseg.nn.weights import read_state
from forks import run_forked
from tiny_task import TinyTask, fit


class Scripted(TinyTask):
    """Its validation figures are given, one per epoch."""

    def __init__(self, figures: Sequence[float]) -> None:
        super().__init__()
        self.figures = list(figures)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/map", self.figures[self.current_epoch])


class Counting(DurableIO):
    """Remembers what was written: (step, name)."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, str]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.written.append((checkpoint["global_step"], Path(path).name))
        super().save_checkpoint(checkpoint, path, storage_options)


def run(
    directory: Path,
    figures: Sequence[float] = (1.0, 2.0),
    *,
    resume: Path | None = None,
    task: L.LightningModule | None = None,
    callbacks: Sequence[L.Callback] = (),
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Checkpoint, Counting]:
    """Train one epoch of six steps per figure."""
    callback, plugin = Checkpoint(dirpath=directory, monitor="val/map", **options), Counting()
    built = L.Trainer(
        accelerator="cpu",
        max_epochs=len(figures),
        callbacks=[callback, *callbacks],
        plugins=[plugin],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=directory.parent,
        **(trainer or {}),
    )
    built.fit(task or Scripted(figures), ckpt_path=resume, weights_only=True)
    return callback, plugin


def steps(directory: Path) -> dict[str, int]:
    return {path.name: check_seal(path).step for path in sorted(directory.iterdir())}


def test_best_and_last_are_one_file_written_once_and_the_one_before_is_kept(tmp_path):
    callback, plugin = run(tmp_path / "c", [1.0, 2.0])
    assert steps(tmp_path / "c") == {"best.ckpt": 12, "last-1.ckpt": 6, "last.ckpt": 12}
    assert plugin.written == [(6, "best.ckpt"), (12, "best.ckpt")]
    assert (tmp_path / "c" / "best.ckpt").samefile(tmp_path / "c" / "last.ckpt")
    assert callback.best_model_path == str(tmp_path / "c" / "best.ckpt") and callback.best_model_score == 2.0
    assert callback.last_model_path == str(tmp_path / "c" / "last.ckpt")


def test_the_last_is_written_where_it_is_not_the_best(tmp_path):
    callback, plugin = run(tmp_path / "c", [3.0, 1.0, 2.0])
    assert steps(tmp_path / "c") == {"best.ckpt": 6, "last-1.ckpt": 12, "last.ckpt": 18}
    assert plugin.written == [(6, "best.ckpt"), (12, "last.ckpt"), (18, "last.ckpt")]
    assert callback.best_model_score == 3.0


@pytest.mark.parametrize(
    ("figures", "options", "expected", "best"),
    [
        ([1, 5, 3, 4], {"save_top_k": 2}, {"best-001-12", "best-003-24"}, 12),
        ([1, 5, 3, 4], {"save_top_k": 2, "mode": "min"}, {"best-000-6", "best-002-18"}, 6),
        ([2, 2, 2], {"save_top_k": 2}, {"best-000-6", "best-001-12"}, 6),
        ([1, 5, 3], {"save_top_k": -1}, {"best-000-6", "best-001-12", "best-002-18"}, 12),
        ([math.nan, 1, math.nan], {"save_top_k": 1}, set(), 12),
        ([-5, math.nan], {"save_top_k": 1}, set(), 6),
        ([1, 5, 7, 6], {"every_n_epochs": 2}, set(), 24),
        ([1, 5, 3], {"save_top_k": 2, "filename": "top{epoch}"}, {"top1", "top2"}, 12),
    ],
)
def test_the_best_by_their_figures(tmp_path, figures, options, expected, best):
    callback, _ = run(tmp_path / "c", figures, **options)
    alias = "top" if "filename" in options else "best"
    found = steps(tmp_path / "c")
    assert set(found) == {f"{name}.ckpt" for name in (*expected, alias, "last", "last-1")}
    assert found[f"{alias}.ckpt"] == best and found["last.ckpt"] == 6 * len(figures)
    assert check_seal(callback.best_model_path).step == best


def test_none_of_the_best_or_no_last(tmp_path):
    callback, _ = run(tmp_path / "a", [1, 2], save_top_k=0)
    assert steps(tmp_path / "a") == {"last-1.ckpt": 6, "last.ckpt": 12} and callback.best_model_path == ""
    run(tmp_path / "b", [2, 1], save_last=False)
    assert steps(tmp_path / "b") == {"best.ckpt": 6}
    run(tmp_path / "c", [2, 1], trainer={"limit_val_batches": 0})
    assert steps(tmp_path / "c") == {"last-1.ckpt": 6, "last.ckpt": 12}
    run(tmp_path / "d", [2, 1, 3], trainer={"check_val_every_n_epoch": 3})
    assert steps(tmp_path / "d") == {"best.ckpt": 18, "last-1.ckpt": 12, "last.ckpt": 18}


def test_a_misspelt_monitor_is_said_at_the_first_validation(tmp_path):
    callback = Checkpoint(dirpath=tmp_path / "c", monitor="val/mapp")
    with pytest.raises(ValueError, match=r"val/mapp: no such figure. Did you mean val/map\?"):
        fit(TinyTask(), tmp_path, callback, plugins=[DurableIO()])
    with pytest.raises(TypeError, match="DurableIO"):
        fit(TinyTask(), tmp_path, callback)
    with pytest.raises(ValueError, match="last_every_n_steps must be positive, got 0"):
        Checkpoint(last_every_n_steps=0)


def test_the_last_within_an_epoch_by_steps_follows_optimiser_steps(tmp_path):
    _, plugin = run(tmp_path / "a", [1.0], last_every_n_steps=4)
    assert plugin.written == [(4, "last.ckpt"), (6, "best.ckpt")]
    _, plugin = run(tmp_path / "b", [1.0, 1.0], last_every_n_steps=1, trainer={"accumulate_grad_batches": 2})
    assert [step for step, name in plugin.written if name == "last.ckpt"] == [1, 2, 3, 4, 5, 6, 6]
    _, plugin = run(tmp_path / "c", [1.0], trainer={"max_steps": 4})
    assert plugin.written == [(4, "last.ckpt")]  # nothing was validated


def test_the_last_within_an_epoch_by_the_clock(tmp_path, monkeypatch):
    clock: Iterator[float] = iter(range(0, 10**6, 40))  # seconds, each look at it 40 later
    monkeypatch.setattr("detseg.callbacks.checkpoint.time.monotonic", lambda: float(next(clock)))
    _, plugin = run(tmp_path / "c", [1.0], last_every_n_minutes=1.5)
    monkeypatch.undo()
    assert [step for step, name in plugin.written if name == "last.ckpt"] == [3, 6]


class Failing(Scripted):
    """After epoch 0 a number in the model, its optimiser or its buffer is not finite."""

    def __init__(self, where: str) -> None:
        super().__init__([1.0, 2.0])
        self.where = where

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            state = self.optimizers().optimizer.state[self.model[0].weight]
            tensor = {"weight": self.model[0].weight.data, "buffer": self.model[1].running_var}.get(self.where)
            tensor = state["momentum_buffer"] if tensor is None else tensor
            tensor.view(-1)[0] = math.nan
            tensor.view(-1)[2] = math.inf


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("weight", "state_dict.model.0.weight: 1 NaN, 1 infinite of 12"),
        ("buffer", "state_dict.model.1.running_var: 1 NaN, 1 infinite of 4"),
        ("optimiser", "optimizer_states.0.state.0.momentum_buffer: 1 NaN, 1 infinite of 12"),
    ],
)
def test_nothing_that_is_not_finite_is_written(tmp_path, where, key):
    with pytest.raises(FloatingPointError, match=key.replace(".", r"\.")) as caught:
        run(tmp_path / "c", [1.0, 2.0], task=Failing(where))
    assert "best.ckpt is not written" in str(caught.value) and "\n" not in str(caught.value)
    assert steps(tmp_path / "c") == {"best.ckpt": 6, "last.ckpt": 6}
    for path in (tmp_path / "c").iterdir():
        assert non_finite(read_checkpoint(path)) == {}


def test_neither_is_an_average_beside_finite_weights_or_the_reverse(tmp_path):
    with pytest.raises(FloatingPointError, match=r"current_model_state\.model\.0\.weight: 1 NaN"):
        run(tmp_path / "c", [1.0, 2.0], task=Failing("weight"), callbacks=[EMA(decay=0.5)])
    assert steps(tmp_path / "c") == {"best.ckpt": 6, "last.ckpt": 6}


def test_what_is_looked_at():
    tensors = {
        "double": torch.tensor([1e300], dtype=torch.float64),  # finite, though not in single precision
        "half": torch.tensor([1.0, -math.inf], dtype=torch.float16),
        "brain": [torch.tensor([math.nan], dtype=torch.bfloat16)],
        "eight": torch.tensor([1.0]).to(torch.float8_e4m3fn),
        "int": torch.tensor([2**40]),
        "empty": torch.zeros(0),
        "deep": {3: (torch.tensor([[1.0, math.nan, math.inf, -math.inf]]), "text", None)},
    }
    assert non_finite(tensors) == {"half": (0, 1, 2), "brain.0": (1, 0, 1), "deep.3.0": (1, 2, 4)}
    check_finite({"callbacks": {"stopper": torch.tensor(math.inf)}, "state_dict": {"w": torch.ones(2)}}, "a.ckpt")
    with pytest.raises(FloatingPointError, match="and 2 tensors more"):
        check_finite({"state_dict": {str(n): torch.tensor([math.nan]) for n in range(5)}}, "a.ckpt")
    assert previous_of("a/last.ckpt") == Path("a/last-1.ckpt") and previous_of("a/best.ckpt") is None


@pytest.mark.parametrize("place", ["same", "moved", "new", "new, the old one moved"])
def test_the_best_figure_survives_going_on(tmp_path, place):
    first = tmp_path / "first" / "c"
    run(first, [5.0, 3.0])
    if "moved" in place:
        shutil.move(tmp_path / "first", tmp_path / "moved")
        first = tmp_path / "moved" / "c"
    target = tmp_path / "second" / "c" if "new" in place else first
    callback, plugin = run(target, [5.0, 3.0, 4.0], resume=first / "last.ckpt")
    assert plugin.written == [(18, "last.ckpt")]  # 4 is no better than 5
    assert callback.best_model_score == 5.0 and callback.best_model_path == str(target / "best.ckpt")
    assert check_seal(target / "best.ckpt").step == 6 and check_seal(target / "last.ckpt").step == 18
    callback, _ = run(target, [5.0, 3.0, 4.0, 6.0], resume=target / "last.ckpt")
    assert callback.best_model_score == 6.0 and check_seal(target / "best.ckpt").step == 24


def test_several_best_ones_survive_going_on(tmp_path):
    run(tmp_path / "a", [5.0, 3.0, 4.0], save_top_k=2)
    callback, _ = run(tmp_path / "b", [5.0, 3.0, 4.0, 1.0], save_top_k=2, resume=tmp_path / "a" / "last.ckpt")
    expected = {"best-000-6.ckpt": 6, "best-002-18.ckpt": 18, "best.ckpt": 6, "last.ckpt": 24}
    assert steps(tmp_path / "b") == expected
    assert callback.state_dict()["best"] == {"best-000-6.ckpt": 5.0, "best-002-18.ckpt": 4.0}
    _, _ = run(tmp_path / "b", [5.0, 3.0, 4.0, 1.0, 9.0], save_top_k=2, resume=tmp_path / "b" / "last.ckpt")
    assert set(steps(tmp_path / "b")) == {f"{n}.ckpt" for n in ("best-000-6", "best-004-30", "best", "last", "last-1")}
    assert steps(tmp_path / "a")["best-002-18.ckpt"] == 18  # the first run's own files are untouched


def test_a_best_file_that_is_gone_is_forgotten_with_its_figure(tmp_path, caplog):
    run(tmp_path / "a", [5.0, 3.0])
    (tmp_path / "a" / "best.ckpt").unlink()
    callback, _ = run(tmp_path / "a", [5.0, 3.0, 4.0], resume=tmp_path / "a" / "last.ckpt")
    assert "best.ckpt, kept as one of the best, is gone or damaged" in caplog.text
    assert callback.best_model_score == 4.0 and steps(tmp_path / "a")["best.ckpt"] == 18


def test_a_start_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".last.ckpt.0123abcd.part").write_bytes(b"half a checkpoint")
    run(tmp_path / "c", [1.0], save_top_k=0, save_last=False)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_damaged_last_is_refused_everywhere_and_the_one_before_goes_on(tmp_path):
    run(tmp_path / "c", [1.0, 2.0])
    last = tmp_path / "c" / "last.ckpt"
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1
    last.write_bytes(raw)  # best.ckpt is the same file
    model = TinyTask().model
    readers = {
        "load": lambda: detseg.load(last),
        "init_from": lambda: init_from(model, last),
        "check_resume": lambda: check_resume(model, last, ["class0", "class1"]),
        "read_checkpoint": lambda: read_checkpoint(last),
        "read_state": lambda: read_state(last),
        "resume": lambda: run(tmp_path / "d", [1.0, 2.0, 3.0], resume=last),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged: it is not what was written") as caught:
            read()
        assert "\n" not in str(caught.value), name
    newest = newest_valid(tmp_path / "c")
    assert newest == tmp_path / "c" / "last-1.ckpt"
    callback, plugin = run(tmp_path / "c", [1.0, 2.0, 3.0], resume=newest)
    assert plugin.written == [(12, "best.ckpt"), (18, "best.ckpt")] and callback.best_model_score == 3.0


def test_detseg_build_attaches_both(in_tmp):
    small = ["model=unet_small", "data.train_images=4", "data.val_images=2", "data.num_workers=0", "logger=none"]
    built = detseg.build(detseg.load_config(*small, "trainer.accelerator=cpu", "callbacks.checkpoint.save_top_k=3"))
    assert isinstance(built.trainer.strategy.checkpoint_io, DurableIO)
    found = built.trainer.checkpoint_callback
    assert isinstance(found, Checkpoint) and found.save_top_k == 3 and found.monitor == "val/miou"
    assert found.dirpath == os.path.realpath(Path(built.cfg.paths.output_dir) / "checkpoints")


class MarkingCheckpoint(Checkpoint):
    """Leaves a file that says what this process ended with, and waits for the other's: the first to end ends both."""

    def _save(self, trainer: L.Trainer, *, compare: bool) -> None:
        try:
            super()._save(trainer, compare=compare)
        except Exception as error:
            place = Path(str(self.dirpath)).parent
            (place / f"rank{trainer.global_rank}").write_text(f"{type(error).__name__}: {error}")
            deadline = time.monotonic() + 30
            while not (place / f"rank{1 - trainer.global_rank}").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            raise


class Refusing(DurableIO):
    """A disk that is full at the second epoch."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if checkpoint["global_step"] > 6 and self._failures is not None:
            self._failures.append(WriteFailed(f"{path} could not be written: No space left on device"))
            return
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.slow
def test_of_two_processes_both_stop_when_the_first_cannot_write(tmp_path):
    callback = MarkingCheckpoint(dirpath=tmp_path / "c", monitor="val/map")
    with pytest.raises(Exception, match="No space left on device"):
        fit(
            Scripted([1.0, 2.0, 3.0]),
            tmp_path,
            callback,
            epochs=3,
            plugins=[Refusing()],
            strategy="ddp_fork",
            devices=2,
            use_distributed_sampler=False,
        )
    told = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert set(told) == {"rank0", "rank1"} and len(set(told.values())) == 1, told
    assert told["rank0"].startswith("WriteFailed: ") and steps(tmp_path / "c") == {"best.ckpt": 6, "last.ckpt": 6}


@pytest.mark.slow
def test_training_on_a_full_disk_ends_with_one_line_and_a_code(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    command = ["train", "model=unet_small", "data.image_size=64"]
    command += ["data.train_images=4", "data.val_images=2", "data.num_workers=0", "logger=none", "trainer.max_epochs=6"]
    command += ["trainer.accelerator=cpu", "callbacks.images=null", "callbacks.checkpoint.save_top_k=-1"]
    command += [f"paths.output_dir={place}/run", f"hydra.run.dir={tmp_path}"]
    try:
        done = run_forked(command, tmp_path)
        files = sorted((place / "run" / "checkpoints").iterdir())
        assert done.returncode == 1, done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if "could not be written" in line]
        assert "No space left on device" in line and "MB are needed" in line and "MB are free" in line
        assert "Traceback" not in done.stderr and len(files) >= 3
        assert all(check_seal(path) is not None for path in files)
        assert newest_valid(place / "run" / "checkpoints") is not None
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_file_written_by_hand_reads_back(tmp_path):
    model = nn.Linear(2, 2)
    plugin = DurableIO()
    plugin.save_checkpoint({"global_step": 3, "state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    assert_close(plugin.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"], model.weight.data)
    write_sealed([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        plugin.load_checkpoint(tmp_path / "list.ckpt")
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"list.ckpt"}


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_the_verbs_say_in_one_line_what_is_wrong_with_a_file(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    write_sealed({"global_step": 1, "state_dict": {"model.w": torch.ones(100)}}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    wrong = {
        "cut": (whole[:-300], "its end is cut off or altered"),
        "flipped": (bytes(flipped), "it is not what was written"),
        "empty": (b"", "is empty (0 bytes)"),
        "foreign": (b"just a text", "cannot be read with weights_only=True"),
    }
    for name, (raw, told) in wrong.items():
        (tmp_path / f"{name}.ckpt").write_bytes(raw)
        extra = ["source=photo.png"] if verb == "predict" else []
        assert main([verb, f"ckpt={name}.ckpt", *extra]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and told in lines[0] and f"{name}.ckpt" in lines[0], (name, lines)


class Clock:
    """Seconds of two processes' run, and how often the first one told the other."""

    def __init__(self) -> None:
        self.now, self.told = 0.0, 0
        self.world_size, self.global_step, self.strategy = 2, 0, self

    def broadcast(self, value: Any) -> Any:
        self.told += 1
        return value


@pytest.mark.parametrize("pace", [0.05, 1.0, 240.0])
def test_processes_look_at_the_clock_ever_more_often_as_the_time_comes_near(pace, monkeypatch):
    """Telling each other waits for the device: not in every step. 240 s a step is nearly half of the ten minutes."""
    clock = Clock()
    monkeypatch.setattr("detseg.callbacks.checkpoint.time.monotonic", lambda: clock.now)
    callback, up = Checkpoint(last_every_n_minutes=10), []
    callback.on_train_start(clock, None)
    while len(up) < 3:
        clock.global_step, clock.now = clock.global_step + 1, clock.now + pace
        if callback._time_is_up(clock):
            up.append(clock.now)
            callback._written = clock.now
    assert all(600 <= b - a < 600 + 1.5 * pace for a, b in zip([0.0, *up], up, strict=False))
    assert clock.told <= min(3 * 20, clock.global_step)
