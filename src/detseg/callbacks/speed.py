"""How fast training goes, and whether the data keep up."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class SpeedMonitor(L.Callback):
    """Log ``speed/images_per_s`` and ``speed/data_wait`` once per epoch.

    Clock readings at batch boundaries alone, so the cost is some microseconds a step. ``data_wait`` is the share of the
    time, in [0, 1], that passed between the end of one batch and the start of the next: loading that the step could
    not hide. The first batch of an epoch is left out, since workers start there. Validation in mid-epoch is not
    counted. Under several processes the images of all are counted, each process taken to be as fast as the first.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._images = 0
        self._wait = self._work = 0.0  # seconds
        self._ended: float | None = None  # when the last batch ended; None: do not count the gap that follows
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last epoch."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock: the batch is there."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock: the step is done."""
        now = time.perf_counter()
        if self._ended is not None:
            self._wait += self._started - self._ended
            self._work += now - self._started
            self._images += len(batch)
        self._ended = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the gap that validation made."""
        self._ended = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both figures."""
        elapsed = self._wait + self._work
        if self._images and elapsed > 0:
            values = {
                "speed/images_per_s": self._images * trainer.world_size / elapsed,
                "speed/data_wait": self._wait / elapsed,
            }
            pl_module.log_dict(values, on_step=False, on_epoch=True, rank_zero_only=True)
