from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close

from detseg.callbacks import EMA
from detseg.callbacks.ema import ema_decay
from tiny_task import TinyTask, fit


class Recorder(L.Callback):
    """Keeps the trained values after every step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.means: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.model[0].weight.detach().clone())
        self.means.append(pl_module.model[1].running_mean.clone())


def by_hand(values: list[torch.Tensor], *, decay: float, warmup: float) -> torch.Tensor:
    average = values[0]
    for step, value in enumerate(values[1:], start=1):
        weight = min(decay, (1 + step) / (warmup + step))
        average = weight * average + (1 - weight) * value
    return average


def checkpoint(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=directory, filename="best", monitor="val/map", mode="max", save_last=True)


def test_decay_grows_to_its_limit():
    assert ema_decay(1, decay=0.999, warmup=10) == pytest.approx(2 / 11)
    assert ema_decay(90, decay=0.999, warmup=10) == pytest.approx(0.91)
    assert ema_decay(10**6, decay=0.999, warmup=10) == 0.999
    assert ema_decay(1, decay=0.9, warmup=1) == 0.9


def test_average_is_what_the_formula_says_and_what_is_validated(tmp_path):
    task, recorder = TinyTask(), Recorder()
    fit(task, tmp_path, EMA(decay=0.8, warmup=5), recorder, epochs=2)
    expected = by_hand(recorder.weights, decay=0.8, warmup=5)
    assert_close(task.seen[-1], expected)  # the last validation saw the average
    assert_close(task.seen[0], by_hand(recorder.weights[:6], decay=0.8, warmup=5))
    assert_close(task.model[0].weight.detach(), expected)  # and training ends with it
    assert (recorder.weights[-1] - expected).abs().max() > 1e-3


def test_training_goes_on_from_its_own_weights_after_validation(tmp_path):
    with_average, without = Recorder(), Recorder()
    torch.manual_seed(3)
    fit(TinyTask(), tmp_path, EMA(decay=0.8), with_average)
    torch.manual_seed(3)
    fit(TinyTask(), tmp_path, without)
    assert len(without.weights) == 12
    for ours, plain in zip(with_average.weights, without.weights, strict=True):
        assert torch.equal(ours, plain)


def test_batch_norm_statistics_are_averaged_and_counts_are_copied(tmp_path):
    task, recorder = TinyTask(), Recorder()
    fit(task, tmp_path, EMA(decay=0.8, warmup=5), recorder, epochs=2)
    assert_close(task.model[1].running_mean, by_hand(recorder.means, decay=0.8, warmup=5))
    assert int(task.model[1].num_batches_tracked) == 12


def test_checkpoints_hold_the_average_and_resume_is_exact(tmp_path):
    recorder = Recorder()
    torch.manual_seed(0)
    fit(TinyTask(), tmp_path, EMA(decay=0.8), checkpoint(tmp_path), recorder, epochs=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_close(saved["state_dict"]["model.0.weight"], by_hand(recorder.weights, decay=0.8, warmup=10))
    assert torch.equal(saved["current_model_state"]["model.0.weight"], recorder.weights[-1])

    straight, resumed = TinyTask(), TinyTask()
    torch.manual_seed(0)
    straight = TinyTask()
    fit(straight, tmp_path / "a", EMA(decay=0.8), epochs=4)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[EMA(decay=0.8)], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(resumed, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_close(resumed.model[0].weight, straight.model[0].weight, rtol=0, atol=0)


def test_validate_after_fit_measures_the_checkpoint_that_was_loaded(tmp_path):
    """Lightning's own callback would put the last average in its place."""
    task = TinyTask()
    trainer = fit(task, tmp_path, EMA(decay=0.8), checkpoint(tmp_path), epochs=2)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    best["state_dict"]["model.0.weight"].fill_(7.0)
    torch.save(best, tmp_path / "other.ckpt")
    trainer.validate(task, ckpt_path=str(tmp_path / "other.ckpt"), verbose=False, weights_only=True)
    assert bool((task.seen[-1] == 7.0).all())


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"warmup": 0.5}])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        EMA(**settings)


def test_the_average_lies_beside_the_weights_and_its_count_on_the_host(tmp_path):
    """Lightning copies the model before it goes to its device; each step would then bring all weights to the host."""
    task, average = TinyTask(), EMA(decay=0.8)
    fit(task, tmp_path, average, epochs=1)
    average.on_fit_start(task.trainer, SimpleNamespace(device=torch.device("meta")))
    inner = average._average_model
    assert {value.device.type for value in inner.module.parameters()} == {"meta"}
    assert {value.device.type for value in inner.module.buffers()} == {"meta"}
    assert inner.n_averaged.device.type == "cpu" and int(inner.n_averaged) == 6
