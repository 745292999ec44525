from __future__ import annotations

import time

import pytest
import torch

from detseg.callbacks import SpeedMonitor
from tiny_task import TinyTask, fit


class Slow(TinyTask):
    """Needs 20 ms for a step and 20 ms for every batch that it loads."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        class Loader:
            def __iter__(self):
                for _ in range(8):
                    time.sleep(0.02)
                    yield [torch.randn(4, 3)]

            def __len__(self):
                return 8

        return Loader()


class Counted(list):
    """A batch that knows its number of images."""

    def __len__(self):
        return 4


def test_speed_and_waiting_share(tmp_path):
    trainer = fit(Slow(), tmp_path, SpeedMonitor(), epochs=1)
    # A plain list of one tensor counts as one image: 7 of 8 batches in 7 x 40 ms.
    speed = float(trainer.callback_metrics["speed/images_per_s"])
    assert 8 < speed <= 25
    assert 0.25 < float(trainer.callback_metrics["speed/data_wait"]) < 0.75


def test_by_a_clock_of_our_own(monkeypatch):
    monitor, logged = SpeedMonitor(), {}
    times = iter([10.0, 11.0, 12.0, 13.0, 20.0, 21.0, 21.5, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))

    class Module:
        def log_dict(self, values, **_):
            logged.update(values)

    class Trainer:
        world_size = 2

    monitor.on_train_epoch_start(None, None)
    for batch in range(4):
        monitor.on_train_batch_start(None, None, None, batch)
        monitor.on_train_batch_end(None, None, None, Counted(), batch)
        if batch == 1:
            monitor.on_validation_end(None, None)  # the 7 s until the next batch are not waiting
    monitor.on_train_epoch_end(Trainer(), Module())
    # Counted: batch 1 (wait 1, work 1) and batch 3 (wait 0.5, work 0.5); batches 0 and 2 follow no batch.
    assert logged == {"speed/images_per_s": pytest.approx(4 * 2 * 2 / 3), "speed/data_wait": pytest.approx(0.5)}


def test_one_batch_gives_no_figure(tmp_path):
    trainer = fit(TinyTask(), tmp_path, SpeedMonitor(), epochs=1, limit_train_batches=1)
    assert "speed/images_per_s" not in trainer.callback_metrics
