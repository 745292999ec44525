"""Ending in order when told to: a checkpoint after the step under way, and an exit code that says so.

Lightning 2.6 broadcasts from within its handler for SIGTERM, which never returns where the signal comes in the middle
of another exchange; it saves nothing, and ends with 0. Here a handler takes a note alone, see
``detseg.callbacks.signals``, which is looked at between two batches.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from detseg.callbacks.checkpoint import Checkpoint
from detseg.callbacks.signals import Signals, listening
from detseg.tasks.position import accumulating, place

log = logging.getLogger(__name__)


class Shutdown(L.Callback):
    """Save ``last.ckpt`` and end when SIGTERM, SIGUSR1 or Ctrl-C comes.

    The step under way, which is the optimiser's, is finished; in validation the batch is, and a resumed run validates
    anew. Several processes agree on the step, one batch later, so that a signal to one of them ends all. Exit codes:
    143 after SIGTERM and SIGUSR1, 130 after Ctrl-C; a second Ctrl-C ends at once. SIGUSR1 in a Slurm job has Slurm
    queue the job again and ends with 0. Without this callback a signal ends the run at once, with the same codes.

    Args:
        grace: seconds within which a batch must end once a signal came, where several processes wait for each other:
            one whose neighbour is dead would wait for ever. It then ends without a checkpoint.
        requeue: on SIGUSR1 in a Slurm job, call ``scontrol requeue``.

    Raises:
        ValueError: ``grace`` is not positive.
    """

    def __init__(self, *, grace: float = 10.0, requeue: bool = True) -> None:
        if grace <= 0:
            raise ValueError(f"Shutdown: grace must be positive, got {grace} seconds")
        self.grace, self.requeue = grace, requeue
        self._signals: Signals | None = None
        self._own: Any = None  # what listens where nobody does yet, as with a trainer of a user's own
        self._agreement: Agreement | None = None
        self._shared_batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Come last: what is saved then has what all others did."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        trainer.callbacks = [*(item for item in callbacks if item is not self), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take notes of signals from here on instead of ending at once."""
        if Signals.active is None:
            self._own = listening()
            self._own.__enter__()
        self._signals = Signals.active
        if self._signals is None:  # in a thread that gets no signals
            return
        if trainer.world_size > 1:
            self._agreement = Agreement()
            # Lightning's own exchange in every step, which waits for the device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        self._signals.install()  # Lightning has put its own in their place
        self._signals.defer(grace=self.grace if trainer.world_size > 1 else None, requeue=self.requeue)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End here if told to, unless the optimiser waits for more batches."""
        self._look(trainer, may_end=not accumulating(trainer, place(trainer)[1]))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on the number of batches in which all can be asked: shares of a split differ by one."""
        if self._agreement is not None:
            self._shared_batches = self._agreement.least(_whole(trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End here if told to."""
        if self._agreement is None or (dataloader_idx == 0 and batch_idx < self._shared_batches):
            self._look(trainer, may_end=True)
        elif self._signals is not None:
            self._signals.beat()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave time for the figures, which the task counts next, and for the best checkpoint."""
        if self._signals is not None:
            self._signals.save()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Expect batches again."""
        if self._signals is not None:
            self._signals.saved()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End if told to in the last moment; what there is to save was saved."""
        told = None if self._signals is None else self._signals.number
        if self._agreement is not None:
            told = self._agreement.finish(told)
        if self._signals is not None and told is not None:
            self._signals.leave(told)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let signals end the run at once again."""
        if self._signals is not None:
            self._signals.undefer()
        own, self._own, self._signals, self._agreement = self._own, None, None, None
        if own is not None:
            own.__exit__(None, None, None)

    def _look(self, trainer: L.Trainer, *, may_end: bool) -> None:
        signals = self._signals
        if signals is None:
            return
        signals.beat()
        told = signals.number if self._agreement is None else self._agreement.ask(signals.number)
        if told is not None and may_end:
            signals.save()
            path = save_last(trainer)
            step, saved = trainer.global_step, "no checkpoint is kept" if path is None else f"saved as {path}"
            if path is not None and path.parent.name == "checkpoints":
                saved += f"; resume={path.parent.parent} goes on"
            if trainer.is_global_zero:
                log.warning("told to end by %s: step %d, %s", signals.name(told), step, saved)
            signals.leave(told)


class Agreement:
    """Tells every process, one question later, of a signal that came to any of them.

    Each question starts an exchange of its own group in host memory and reads the one before, so nobody waits for the
    step that runs on a device.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self._work: Any = None
        self._sent = torch.zeros(1, dtype=torch.int64)
        self._told = 0

    def ask(self, number: int | None) -> int | None:
        """Return the signal that the last question told of; all processes must ask as often."""
        self._read()
        self._sent = torch.tensor([max(number or 0, self._told)])
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return self._told or None

    def least(self, number: int) -> int:
        """Return the smallest of all processes' numbers."""
        found = torch.tensor([number])
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._group)
        return int(found)

    def finish(self, number: int | None) -> int | None:
        """Return the signal that any process knows of, now."""
        self._read()
        found = torch.tensor([max(number or 0, self._told)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return int(found) or None

    def _read(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._told = max(self._told, int(self._sent))
            self._work = None


def save_last(trainer: L.Trainer) -> Path | None:
    """Write ``last.ckpt`` where the run keeps its checkpoints; return it, or ``None`` where none is kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint):
            return callback.write_last(trainer)
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            path = Path(callback.dirpath) / "last.ckpt"
            trainer.save_checkpoint(path)
            return path
    return None


def _whole(counts: list[int | float]) -> int:
    """Return the number of batches of the first split; one that does not know it is asked in none."""
    return int(counts[0]) if counts and counts[0] != float("inf") else 0


def _nothing() -> None:
    """Stand for what is not to be done."""
