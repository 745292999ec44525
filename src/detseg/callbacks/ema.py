"""Exponential moving average of the weights.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, average the iterates; the moving
form with a decay that grows from small is what TensorFlow's ``ExponentialMovingAverage`` does with ``num_updates``.
Built on Lightning's ``WeightAveraging``; what differs is said at each method.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


def ema_decay(updates: int, *, decay: float, warmup: float) -> float:
    """Return the weight of the old average in update number ``updates`` (1 is the second one; the first copies)."""
    return min(decay, (1 + updates) / (warmup + updates))


class EMA(WeightAveraging):
    """Average the weights over the steps; validation and checkpoints use the average.

    A checkpoint's ``state_dict`` is the average, its ``current_model_state`` the weights that training goes on from, so
    ``resume`` is exact. Floating buffers, which are the running statistics of batch norm, are averaged like the
    weights; integer buffers, such as batch counts, are copied. The average of weights in 16 bits is in 32.

    Args:
        decay: weight of the old average at each step, in [0, 1).
        warmup: at step t the decay is at most ``(1 + t) / (warmup + t)``; 1 switches this off.

    Raises:
        ValueError: ``decay`` or ``warmup`` is outside its range.
    """

    def __init__(self, *, decay: float = 0.999, warmup: float = 10.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}; 0.999 suits a few thousand steps")
        if warmup < 1:
            raise ValueError(f"EMA: warmup must be at least 1, got {warmup}; 1 switches it off")
        self.decay, self.warmup = decay, warmup
        self._swapped = False
        """Whether the model holds the average and the average model the training weights, as in validation."""
        super().__init__(use_buffers=True, multi_avg_fn=self._average)

    def _average(self, averaged: list[Tensor], current: list[Tensor], updates: int | Tensor) -> None:
        """Move ``averaged``, tensors of one type, towards ``current`` in place."""
        if not averaged[0].is_floating_point():  # Lightning would average batch counts and truncate them
            torch._foreach_copy_(averaged, current)
            return
        if current[0].dtype != averaged[0].dtype:  # weights in 16 bits, in which an average would stand still
            current = [value.to(average.dtype) for value, average in zip(current, averaged, strict=True)]
        weight = 1 - ema_decay(int(updates), decay=self.decay, warmup=self.warmup)
        torch._foreach_lerp_(averaged, current, weight)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average beside the weights.

        Lightning copies the model before it is on its device: each step would bring all weights to the host and wait.
        The number of updates stays there, where reading it waits for nothing.
        """
        average = cast(AveragedModel, self._average_model)
        count = average.n_averaged.cpu()
        average.to(pl_module.device)
        average.n_averaged = count

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimiser step."""
        if trainer.global_step > self._latest_update_step and self.should_update(step_idx=trainer.global_step - 1):
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def _update(self, pl_module: L.LightningModule) -> None:
        """Do what ``AveragedModel.update_parameters`` does, which sends its count to the device and back."""
        average = cast(AveragedModel, self._average_model)
        updates = int(average.n_averaged)
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        theirs = chain(pl_module.parameters(), pl_module.buffers())
        for own, value in zip(chain(average.module.parameters(), average.module.buffers()), theirs, strict=True):
            averaged, current = groups.setdefault((own.device, own.dtype), ([], []))
            averaged.append(own.detach())
            current.append(value.detach())
        for averaged, current in groups.values():
            if updates:
                self._average(averaged, current, updates)
            else:
                torch._foreach_copy_(averaged, current)
        average.n_averaged += 1

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in place, inside ``fit`` alone.

        Lightning does so in ``validate`` after ``fit`` too, where it would replace the checkpoint just loaded.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the training weights back, inside ``fit`` alone."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the average from the model as it is."""
        self._swapped = False
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the model with the average; the training weights stay beside it, for a checkpoint saved now.

        Lightning overwrites them, so that a run that ended within an epoch could not be resumed.
        """
        self._swap_models(pl_module)
        self._swapped = True

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and training weights, inside ``fit`` alone.

        Lightning does so in ``validate`` and ``test`` after ``fit`` too, where the training weights would replace the
        average that is to be measured.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average first, inside ``fit`` alone; a checkpoint saved later holds what the model has by then.

        In validation the two have changed places, which Lightning would save the wrong way round.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average
