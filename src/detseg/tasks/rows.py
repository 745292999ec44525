"""Figures on their way to the loggers, without ``self.log``, of which every call costs half a millisecond.

Lightning's ``self.log`` prepares a result object per name and call, whatever the logging interval. Here the figures of
a step become one tensor, cross to the host once, and reach every logger as one row together with the learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from detseg.tasks.processes import gather, mean_over_processes


@dataclass
class Pending:
    """A row that is on its way to the host.

    Attributes:
        step: optimiser steps before the one that the row is of; 0 for the first.
        epoch: passes over the training split before this one.
        names: one per figure.
        values: ``(n,)`` in host memory, valid once ``arrived`` is.
        rates: learning rates of the step by name.
        arrived: ``None`` where the values are there already.
    """

    step: int
    epoch: int
    names: list[str]
    values: Tensor
    rates: dict[str, float]
    arrived: torch.cuda.Event | None

    def figures(self) -> dict[str, float]:
        """Return the whole row as plain numbers, waiting for it if need be."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return {**dict(zip(self.names, self.values.tolist(), strict=True)), **self.rates, "epoch": self.epoch}


class TrainRow:
    """Collects the figures of one optimiser step and writes them to the trainer's loggers.

    Under gradient accumulation the figures are the mean over the step's batches, under several processes the mean over
    them. On a GPU a row is written when the next one is due, or at ``flush``: reading it at once would stop the queue
    of kernels. ``trainer.callback_metrics`` has the figures at once, for early stopping and checkpoints by ``train/*``.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None  # (n,) over the batches of this optimiser step
        self._batches = 0
        self._step = 0
        self._rates: dict[str, float] = {}
        self._pending: Pending | None = None

    def add(self, trainer: L.Trainer, figures: Mapping[str, Tensor]) -> None:
        """Take one batch's figures, on one device and without a transfer.

        Args:
            trainer: for the number of the step and the learning rates, which are those before the optimiser's step.
            figures: single numbers by name, such as ``"train/loss"``; the first one says the device.
        """
        first = next(iter(figures.values()))
        kind = torch.float64 if first.dtype == torch.float64 else torch.float32
        values = torch.stack([value.detach().to(first.device, kind) for value in figures.values()])  # (n,)
        if self._sum is not None and self._step == trainer.global_step and self._names == list(figures):
            self._sum, self._batches = self._sum + values, self._batches + 1
            return
        self._names, self._sum, self._batches = list(figures), values, 1
        self._step, self._rates = trainer.global_step, learning_rates(trainer.optimizers)

    def step_done(self, trainer: L.Trainer) -> None:
        """Send the row off if the optimiser stepped since ``add``; to be called after every batch."""
        if self._sum is None or trainer.global_step == self._step:
            return
        values, self._sum = self._sum, None
        if self._batches > 1:
            values = values / self._batches
        if trainer.world_size > 1:
            values = mean_over_processes(values)
        for shown in (trainer.callback_metrics, trainer.logged_metrics):
            shown.update(zip(self._names, values.unbind(), strict=True))
        if not trainer.loggers or not trainer.is_global_zero:
            return
        self.flush(trainer)
        self._pending = self._depart(values, trainer.current_epoch)
        if self._pending.arrived is None:
            self.flush(trainer)

    def _depart(self, values: Tensor, epoch: int) -> Pending:
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = cast(Any, torch.cuda.Event)()  # untyped in torch 2.14
            arrived.record()
        return Pending(self._step, epoch, self._names, values, self._rates, arrived)

    def start(self, trainer: L.Trainer) -> None:
        """Let loggers with files of an earlier start forget what lies past the step that training goes on from.

        Epochs with fewer steps than ``log_every_n_steps`` get a row each, of their last step.
        """
        steps = -(-trainer.num_training_batches // max(1, trainer.accumulate_grad_batches))
        if 0 < steps < cast(Any, trainer).log_every_n_steps:  # infinite batches make NaN, which is neither
            cast(Any, trainer).log_every_n_steps = int(steps)
        for logger in trainer.loggers:
            begin_at = getattr(logger, "begin_at", None)
            if begin_at is not None:
                begin_at(trainer.global_step)

    def save(self, trainer: L.Trainer) -> None:
        """Bring everything to disk, as before a checkpoint: whoever goes on from that will miss no row.

        Callbacks save right after a step, which is before the task hears of its end; that row belongs to it too.
        """
        self.step_done(trainer)
        self.flush(trainer)
        for logger in trainer.loggers:
            logger.save()

    def flush(self, trainer: L.Trainer) -> None:
        """Write the row that is on its way, if there is one."""
        if self._pending is None:
            return
        row, self._pending = self._pending, None
        figures = row.figures()
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=row.step)


def learning_rates(optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """Return the rate of every parameter group as ``lr-AdamW/<name of the group>``.

    Groups without a name are called ``pg1``, ``pg2`` ...; a single one without a name is just ``lr-AdamW``.
    """
    rates = {}
    for optimizer in optimizers:
        groups = optimizer.param_groups
        for number, group in enumerate(groups, start=1):
            name = group.get("name", f"pg{number}" if len(groups) > 1 else "")
            rates[f"lr-{type(optimizer).__name__}" + (f"/{name}" if name else "")] = float(group["lr"])
    return rates


class MeanRow:
    """The mean of figures over an epoch of evaluation, weighted by the images of each batch.

    Adds up on the device in float64 (float32 on MPS), so that a step costs some microseconds and no transfer.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, float]] = {}

    def add(self, figures: Mapping[str, Tensor], images: int) -> None:
        """Add one batch's figures; ``images`` is its weight, and a batch of none says nothing."""
        if images == 0:
            return
        names = tuple(figures)
        first = figures[names[0]]
        kind = torch.float32 if first.device.type == "mps" else torch.float64
        values = torch.stack([value.detach().to(first.device, kind) for value in figures.values()]) * images  # (n,)
        if names in self._sums:
            before, weight = self._sums[names]
            values, images = before + values, int(weight) + images
        self._sums[names] = (values, images)

    def take(self) -> dict[str, float]:
        """Return the means over all processes and start anew; a process that saw no image takes part all the same."""
        mine: dict[str, tuple[float, float]] = {}
        for names, (values, weight) in self._sums.items():
            for name, value in zip(names, values.tolist(), strict=True):
                before = mine.get(name, (0.0, 0.0))
                mine[name] = (before[0] + value, before[1] + weight)
        self._sums = {}
        shares = gather(mine)
        seen = dict.fromkeys(name for share in shares for name in share)
        found = {name: [share[name] for share in shares if name in share] for name in seen}
        return {name: sum(v for v, _ in pairs) / sum(w for _, w in pairs) for name, pairs in found.items()}
