"""Where a run stands, for checkpoints from which training goes on bit for bit.

Lightning 2.6 keeps counters from which it guesses at which hook a checkpoint was saved. Of one saved after a step it
begins the epoch's images anew, of one saved after the epoch's last step it leaves the validation out, and of one saved
in validation it counts the rest of the split alone. So the place is written down here in plain words, and on loading
the counters are set to the one of three states that Lightning does go on from exactly: between two epochs, after a
batch of an epoch, or before the validation that follows a batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from detseg.tasks.processes import gather

if TYPE_CHECKING:
    from detseg.tasks.base import Task

POSITION = "detseg_position"
"""Key of a checkpoint."""


class Position:
    """Writes the place of a run into checkpoints and takes it up again; a task holds one and calls it in its hooks."""

    def __init__(self) -> None:
        self._validated: tuple[int, int] | None = None
        """(epoch, batches trained in it) at the end of the last validation."""
        self._loaded: dict[str, Any] | None = None
        self._max_steps: int | None = None

    def capture(self, task: Task) -> dict[str, Any]:
        """Return what goes into a checkpoint: plain values and tensors. Every process must call it, as it gathers.

        Returns:
            ``epoch`` (finished epochs), ``batch`` (batches trained since), ``batches`` (of an epoch), ``images`` (per
            batch of all processes), ``due`` and ``pending`` (a validation follows this batch; it is still to do),
            ``stepped`` (Lightning's count of batches that ended a step), ``random`` and ``gradients`` (per process),
            ``figures`` and ``results``.
        """
        trainer, loop = task.trainer, task.trainer.fit_loop
        epoch, batch = place(trainer)
        due = validation_due(trainer, epoch=epoch, batch=batch)
        waiting = accumulating(trainer, batch)
        counted = batch == 0 or loop.epoch_loop.batch_progress.current.ready > batch  # after the validation
        return {
            "epoch": epoch,
            "batch": batch,
            "batches": _whole(loop.max_batches),
            "images": _images_per_batch(trainer),
            "due": due,
            "pending": batch > 0 and due and self._validated != (epoch, batch),
            "stepped": loop.epoch_loop._batches_that_stepped + int(not counted and not waiting),
            "accumulating": waiting,
            "random": gather(random_state(task.device)),
            "gradients": gather(gradients(task)) if waiting else [],
            "figures": {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()},
            "results": {stage: dict(figures) for stage, figures in task.results.items()},
        }

    def load(self, task: Task, checkpoint: Mapping[str, Any]) -> None:
        """Take up the place of a checkpoint: set the counters that Lightning will read from it."""
        position = checkpoint.get(POSITION)
        trainer = task.trainer
        if position is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = dict(position)
        self._validated = None if position["pending"] else (position["epoch"], position["batch"])
        task.results.update(position["results"])
        steps = trainer.max_steps
        rewrite(checkpoint["loops"]["fit_loop"], position, by_steps=steps != -1)
        if position["pending"] and 0 <= steps <= checkpoint["global_step"]:
            self._max_steps = steps

    def prepare(self, trainer: L.Trainer) -> None:
        """Let the validation after the last of ``max_steps`` steps be done: Lightning would not begin the loop."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps + 1

    def restore(self, task: Task) -> None:
        """Set random numbers, figures and half-summed gradients as they were, before the first batch.

        Raises:
            ValueError: the batches differ from those of the checkpoint, which is from the middle of an epoch.
        """
        position, self._loaded = self._loaded, None
        if position is None:
            return
        trainer = task.trainer
        _check_batches(trainer, position)
        if position["batch"] > 0:
            cast(Any, trainer.train_dataloader).load_state_dict({name: position[name] for name in ("epoch", "batch")})
        trainer.callback_metrics.update({name: value.to(task.device) for name, value in position["figures"].items()})
        if len(position["random"]) == trainer.world_size:  # of another number of processes none would be right
            set_random_state(position["random"][trainer.global_rank], task.device)
        if len(position["gradients"]) == trainer.world_size:
            set_gradients(task, position["gradients"][trainer.global_rank])

    def validated(self, trainer: L.Trainer) -> None:
        """Note that the validation after the present batch is done."""
        loop = trainer.fit_loop
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validated = place(trainer)
        if self._max_steps is not None:
            loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None


def place(trainer: L.Trainer) -> tuple[int, int]:
    """Return the number of finished epochs, and of batches trained since."""
    epochs = cast(Any, trainer.fit_loop.epoch_progress.current)  # Lightning's types know less than these counters
    batches = cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current)
    return epochs.processed, batches.processed if epochs.started > epochs.processed else 0


def rewrite(loops: dict[str, Any], position: Mapping[str, Any], *, by_steps: bool) -> None:
    """Set a checkpoint's counters to what Lightning goes on from exactly.

    Args:
        loops: the checkpoint's ``loops["fit_loop"]``.
        position: from ``Position.capture``.
        by_steps: training ends after ``max_steps``; Lightning then takes every start for a restart.
    """
    epoch, batch, pending = position["epoch"], position["batch"], position["pending"]
    begun = epoch + int(batch > 0)
    _count(loops["epoch_progress"], ready=begun, started=begun, processed=epoch, completed=epoch)
    _count(loops["epoch_loop.batch_progress"], ready=batch, started=batch, processed=batch, completed=batch)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    validation = {"ready": int(pending), "started": int(pending), "processed": 0, "completed": 0}
    loops["epoch_loop.val_loop.batch_progress"] |= {
        "total": dict(validation),
        "current": dict(validation),
        "is_last_batch": False,
    }
    # Where a validation is due after the batch (or, by steps, before an epoch), Lightning passes the end of the batch
    # once more, whether it then validates or not, and counts it once more.
    passes = position["due"] and not position["accumulating"] and (batch > 0 or by_steps)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = position["stepped"] - int(passes)
    loops["state_dict"]["combined_loader"] = []  # by then Lightning may have set its loaders up, to count the steps


def _count(progress: dict[str, Any], **values: int) -> None:
    """Set the counters of this epoch or fit; the totals change by as much."""
    for name, value in values.items():
        progress["current"][name] = value
    progress["total"] = dict.fromkeys(progress["total"], progress["total"]["processed"])
    for name, value in values.items():
        progress["total"][name] += value - values["processed"]


def validation_due(trainer: L.Trainer, *, epoch: int, batch: int) -> bool:
    """Say whether a validation follows the ``batch``-th batch of an epoch, as Lightning counts from 1 and from 0."""
    every, after = trainer.check_val_every_n_epoch, getattr(trainer, "val_check_batch", None)
    if not trainer.enable_validation or (every is not None and (epoch + 1) % every):
        return False
    if after is None:  # by the clock, or before the data are set up
        return trainer.validating
    loop = trainer.fit_loop
    if after == float("inf"):
        return batch > 0 and batch == loop.max_batches
    number = cast(Any, loop.epoch_loop.batch_progress.total).processed if every is None else batch
    return bool(number % after == 0)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of torch (CPU, and ``device`` where it is a GPU), numpy and Python."""
    name, keys, place, has_gauss, gauss = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let the generators go on from what ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))


def gradients(task: L.LightningModule) -> dict[str, Tensor]:
    """Return what is summed so far for the step under way, by parameter."""
    return {name: value.grad.detach().cpu() for name, value in task.named_parameters() if value.grad is not None}


def set_gradients(task: L.LightningModule, values: Mapping[str, Tensor]) -> None:
    """Go on summing from what ``gradients`` returned."""
    for name, parameter in task.named_parameters():
        if name in values:
            parameter.grad = values[name].to(parameter.device)


def accumulating(trainer: L.Trainer, batch: int) -> bool:
    """Say whether the optimiser waits for more batches after this one."""
    return batch % trainer.accumulate_grad_batches != 0 and batch != trainer.fit_loop.max_batches


def _whole(count: float) -> int:
    return -1 if count == float("inf") else int(count)


def _images_per_batch(trainer: L.Trainer) -> int:
    """Return the images of one batch over all processes; 0 where there is no loader that says so."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return int(size or 0) * trainer.world_size


def _check_batches(trainer: L.Trainer, position: Mapping[str, Any]) -> None:
    """Raise if the rest of an epoch would be cut into other batches than its beginning was."""
    saved = position["batches"], position["images"]
    now = _whole(trainer.fit_loop.max_batches), _images_per_batch(trainer)
    if position["batch"] > 0 and now != saved:
        raise ValueError(
            f"the checkpoint is from batch {position['batch']} of {saved[0]} in epoch {position['epoch'] + 1}, of "
            f"{saved[1]} images each over all processes; this run has {now[0]} batches of {now[1]}: keep "
            "data.batch_size and trainer.devices until an epoch's end, or start with init_from"
        )
