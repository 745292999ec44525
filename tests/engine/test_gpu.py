"""What behaves differently on a GPU; where the same test makes sense on a CPU, it runs there too."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

import detseg
from detseg.callbacks import EMA
from detseg.checkpoint import read_checkpoint
from detseg.tasks.rows import TrainRow

PLACES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
TINY = [
    "model=fcos_small",
    "data.train_images=8",
    "data.val_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "trainer.precision=32-true",
    "callbacks.images=null",
    "logger=none",
    "evaluate_after=false",
]


class At(L.Callback):
    """Calls ``work`` before the batch that follows ``step`` optimiser steps."""

    def __init__(self, step: int, work: Any) -> None:
        self.step, self.work = step, work

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.work(trainer, pl_module, batch)


def train(place: str, directory: Path, *overrides: str, at: At | None = None) -> Any:
    run = detseg.build(detseg.load_config(*TINY, f"trainer={place}", *overrides, f"paths.output_dir={directory}"))
    if at is not None:
        run.trainer.callbacks.insert(0, at)
    run.trainer.fit(run.task, run.data, ckpt_path=run.cfg.resume, weights_only=True)
    return run


def last(directory: Path) -> dict[str, Any]:
    return read_checkpoint(directory / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("place", PLACES)
def test_goes_on_bit_for_bit_within_an_epoch(place: str, in_tmp: Path):
    """With averaged weights, and on a GPU with its own random numbers and repeatable operations."""
    shape = ["features=[ema,deterministic]", "callbacks.checkpoint.last_every_n_steps=1"]

    def keep(trainer: L.Trainer, *_: Any) -> None:
        shutil.copy(in_tmp / "a" / "checkpoints" / "last.ckpt", in_tmp / "third.ckpt")

    train(place, in_tmp / "a", *shape, at=At(3, keep))
    train(place, in_tmp / "b", *shape, f"resume={in_tmp / 'third.ckpt'}")
    whole, rest = last(in_tmp / "a"), last(in_tmp / "b")
    assert read_checkpoint(in_tmp / "third.ckpt")["global_step"] == 3 and whole["global_step"] == 8
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert value.device.type == "cpu"  # as any machine reads it
            assert_close(rest[part][name], value, rtol=0, atol=0, msg=f"{part} {name}")
    assert (whole["detseg_position"]["random"][0]["cuda"] is None) == (place == "cpu")


@pytest.mark.parametrize("place", PLACES)
def test_a_step_of_nan_is_left_out(place: str, in_tmp: Path):
    """Under loss scaling too, which then also halves its scale."""

    def spoil(trainer: L.Trainer, task: Any, batch: Any) -> None:
        batch.images.fill_(math.nan)

    precision = "16-mixed" if place == "gpu" else "32-true"
    run = train(
        place, in_tmp / "a", f"trainer.precision={precision}", "callbacks.guard.action=skip", at=At(2, spoil)
    )  # fmt: skip
    assert run.trainer.global_step == 8 and all(value.isfinite().all() for value in run.task.state_dict().values())
    guard = next(item for item in run.trainer.callbacks if type(item).__name__ == "Guard")
    assert guard.skipped == 1 and (in_tmp / "a" / "nonfinite_step_2.pt").is_file()
    content = torch.load(in_tmp / "a" / "nonfinite_step_2.pt", weights_only=True)
    assert (content["windows"][0]["batches"][0]["cuda"] is None) == (place == "cpu")


@pytest.mark.slow
@pytest.mark.gpu
def test_a_scale_that_overflows_is_none_of_the_guards_business(in_tmp: Path):
    def grow(trainer: Any, *_: Any) -> None:
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)

    run = train("gpu", in_tmp / "a", "trainer.precision=16-mixed", at=At(0, grow))
    guard = next(item for item in run.trainer.callbacks if type(item).__name__ == "Guard")
    assert guard.skipped == 0 and not list((in_tmp / "a").glob("nonfinite_*"))
    assert run.trainer.precision_plugin.scaler.get_scale() < 2.0**40
    assert all(value.isfinite().all() for value in run.task.state_dict().values())
    assert last(in_tmp / "a")["MixedPrecision"]["scale"] == run.trainer.precision_plugin.scaler.get_scale()


@pytest.mark.slow
@pytest.mark.gpu
def test_copies_rows_and_averages_wait_for_nothing(in_tmp: Path):
    """The average lies beside the weights; torch raises where the host would wait for the device."""
    done: list[str] = []

    def work(trainer: Any, task: Any, batch: Any) -> None:
        average = next(item for item in trainer.callbacks if isinstance(item, EMA))
        assert {value.device for value in average._average_model.module.parameters()} == {task.device}
        host = trainer.datamodule.last_batch.pin_memory()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            moved = trainer.datamodule.transfer_batch_to_device(host, task.device, 0)
            average._update(task)
            row = TrainRow()
            row.add(trainer, {"train/a": torch.ones((), device=task.device)})
            task.guard.take(moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert moved.images.device == task.device and host.images.is_pinned()
        task.guard._window.pop()
        done.append("all")

    train("gpu", in_tmp / "a", "features=[ema]", at=At(3, work))
    assert done == ["all"]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_gpus_train_one_model(trainer: str, in_tmp: Path):
    shape = [f"trainer={trainer}", "trainer.devices=2", f"paths.output_dir={in_tmp / 'a'}", "data.batch_size=1"]
    outcome = detseg.train(detseg.load_config(*TINY, *shape))
    found = read_checkpoint(in_tmp / "a" / "checkpoints" / "last.ckpt")
    assert found["global_step"] == 8 and len(found["detseg_position"]["random"]) == 2
    assert all(value.isfinite().all() for value in found["state_dict"].values())
    assert detseg.load(in_tmp / "a" / "checkpoints" / "last.ckpt") is not None and outcome.figures
