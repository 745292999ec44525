"""The learning rate as a logged figure."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor


class LearningRate(LearningRateMonitor):
    """Lightning's ``LearningRateMonitor``, silent instead of failing where a run has no logger (``logger=none``).

    Args:
        logging_interval: ``"step"``, ``"epoch"``, or ``None`` for the scheduler's own.
    """

    def __init__(self, *, logging_interval: str | None = "step") -> None:
        super().__init__(logging_interval=logging_interval)  # type: ignore[arg-type]  # Literal, checked by the parent

    def on_train_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Find the optimizers, if there is anything to log to."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)
