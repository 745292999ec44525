"""A loss or gradient that is NaN or infinite: nothing of it reaches the weights, and a file replays it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from detseg.callbacks.replay_file import Seen, gather_windows, write_replay
from detseg.data.module import DetectionData
from detseg.structures import Batch, Target
from detseg.tasks.processes import gather

log = logging.getLogger(__name__)

REMEDY = "lower optimizer.lr, lengthen the warm-up, or set trainer.gradient_clip_val"


@dataclass
class Verdict:
    """What was found wrong with one optimiser step, the same on every rank.

    Attributes:
        spoilt: whether a loss is not finite, on any rank; else the gradient alone is not.
        losses: the loss with its terms, of each of ``ranks``.
        norm: of the gradients, over all ranks.
        images: files or ids of the images that it came from; of all, where that cannot be told.
        ranks: the processes that it came from; all of them where the losses are finite.
    """

    spoilt: bool
    losses: str
    norm: float
    images: str
    ranks: list[int]


class Guard(L.Callback):
    """Stop before the step of a non-finite loss or gradient, or leave that step out; list what gets no gradient.

    The verdict needs one number, the norm that clipping takes anyway: a loss that is not finite turns the gradients
    into NaN, on every rank by their own reduction, so that all ranks decide alike. What remains per step is a copy of
    the batch norms' statistics (which a bad forward pass spoils before anyone knows), the state of the random numbers,
    and on a GPU that the host waits for the backward pass.

    The replay file ``nonfinite_step_<n>.pt`` holds the batches since the last step, the random numbers' state before
    each, the weights and the checkpoint's stamp, plain values all; ``detseg replay <file>`` names the first layer that
    is not finite. When steps are left out, the first of a run is written.

    With ``precision=16-mixed`` the loss scaling overflows now and then by design and leaves those steps out itself:
    they are none of the guard's business while the losses are finite and the scale is above 1.

    Before the first step, trainable parameters that got no gradient are named in a warning; in a run of several
    processes, which would average only some of the gradients, in an error.

    Args:
        action: ``"stop"`` raises; ``"skip"`` drops the gradients, so that neither weights, momentum nor decay move.
        max_skips: steps left out in a row, after which the run stops all the same.
        dirpath: folder of the replay file; default: the trainer's ``default_root_dir``.

    Raises:
        ValueError: ``action`` is neither word, or ``max_skips`` is below 1.
    """

    def __init__(self, *, action: str = "stop", max_skips: int = 10, dirpath: str | Path | None = None) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"callbacks.guard.action is {action!r}; it must be stop or skip")
        if max_skips < 1:
            raise ValueError(f"callbacks.guard.max_skips is {max_skips}; it must be at least 1 (or set action=stop)")
        self.action, self.max_skips, self.dirpath = action, max_skips, dirpath
        self.skipped = 0
        """Steps left out since training began, over all resumed runs."""
        self.file: Path | None = None
        """The replay file that was written last, on rank 0."""
        self._in_a_row = 0
        self._window: list[Seen] = []  # batches since the last step
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._kept: dict[torch.dtype, list[Tensor]] = {}  # what the buffers were before the window
        self._silent: list[str] | None = None
        self._checked = False
        self._trainer: L.Trainer | None = None
        self._task: L.LightningModule | None = None

    # The run around the steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch."""
        self._trainer, self._task = trainer, pl_module
        self._checked, self._window = False, []
        self._buffers = _persistent_buffers(cast(torch.nn.Module, pl_module.model))
        self._kept = {dtype: [torch.empty_like(one) for one in group] for dtype, group in self._buffers.items()}
        cast(Any, pl_module).guard = self

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch no longer."""
        self._release(pl_module)
        if self.skipped and trainer.is_global_zero:
            log.warning("steps left out, as their loss or gradient was not finite: %d", self.skipped)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the batches."""
        self._release(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what has no gradient so far, until the first step; callbacks may drop some on purpose later."""
        if not self._checked:
            named = cast(torch.nn.Module, pl_module.model).named_parameters()
            self._silent = [name for name, weight in named if weight.requires_grad and weight.grad is None]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on counting from."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts of the run before."""
        self.skipped, self._in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])

    # Inside a step, called by the task

    def take(self, batch: Batch) -> None:
        """Keep a training batch and the random numbers' state before it; keep the buffers before the first."""
        if not self._window:
            for dtype, buffers in self._buffers.items():
                torch._foreach_copy_(self._kept[dtype], buffers)
        device = cast(L.LightningModule, self._task).device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        host = _host_copy(cast(L.Trainer, self._trainer))
        self._window.append(Seen(batch if host is None else host, torch.get_rng_state(), cuda))

    def follow(self, loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, exactly, with gradients that are NaN where the loss is not finite."""
        if not self._window:  # a task driven by hand, without the loader's hook
            return loss
        self._window[-1].terms = {name: term.detach() for name, term in terms.items()}
        value = loss.detach()
        self._window[-1].loss = value
        return loss * (1 + 0 * value)  # x * 1 is x; 0 * inf and 0 * nan are nan

    def judge(self, norm: Tensor, optimizer: Optimizer) -> None:
        """Raise, or drop the gradients, where the norm says that the step would spoil the weights.

        Raises:
            FloatingPointError: a loss or gradient is not finite, with ``action="stop"`` or too many times in a row.
            ValueError: parameters without gradient in a run of several processes.
        """
        if not self._checked:
            self._checked = True
            _report_silent(self._silent or [], cast(L.Trainer, self._trainer).world_size)
        whole = cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        value = float(whole)
        if math.isfinite(value):
            self._in_a_row = 0
        else:
            self._condemn(value, optimizer)
        self._window = []

    def _condemn(self, norm: float, optimizer: Optimizer) -> None:
        trainer, task = cast(L.Trainer, self._trainer), cast(L.LightningModule, self._task)
        verdict = _agree(self._window, norm, trainer.world_size, trainer.global_rank)
        if not verdict.spoilt and _scaler_handles(trainer):
            return
        for dtype, buffers in self._buffers.items():
            torch._foreach_copy_(buffers, self._kept[dtype])
        stop = self.action == "stop" or self._in_a_row >= self.max_skips
        told = f"step {task.global_step}: {_describe(verdict)} on images {verdict.images}"
        if stop or not self.skipped:
            told += self._replay(trainer, task, verdict)
        if stop:
            row = f" This was step {self._in_a_row + 1} in a row." if self.action == "skip" else ""
            raise FloatingPointError(f"{told}; {REMEDY}.{row}")
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        _drop_gradients(optimizer)
        if trainer.is_global_zero:
            log.warning("%s; the step was left out (%d so far)", told, self.skipped)

    def _replay(self, trainer: L.Trainer, task: L.LightningModule, verdict: Verdict) -> str:
        """Write the replay file and return what to say about it; the error at hand matters more than the file's."""
        windows = gather_windows(self._window, verdict.ranks, trainer.world_size, trainer.global_rank)
        path = Path(self.dirpath or trainer.default_root_dir) / f"nonfinite_step_{task.global_step}.pt"
        state = trainer.strategy.lightning_module_state_dict()  # of a sharded model on all ranks together
        cause = {"losses": verdict.losses, "norm": str(verdict.norm), "images": verdict.images}
        said = f"; replay it with: detseg replay {path}"
        if trainer.is_global_zero:
            try:
                self.file = write_replay(path, trainer=trainer, task=task, state=state, windows=windows, cause=cause)
            except (OSError, RuntimeError, TypeError) as error:
                said = f" (no replay file: {str(error).splitlines()[0]})"
        trainer.strategy.barrier("guard")  # the first process that ends has the others ended, while this one writes
        return said

    def _release(self, pl_module: L.LightningModule) -> None:
        self._window, self._trainer, self._task = [], None, None
        self._buffers, self._kept = {}, {}
        if getattr(pl_module, "guard", None) is self:
            cast(Any, pl_module).guard = None


def _persistent_buffers(model: torch.nn.Module) -> dict[torch.dtype, list[Tensor]]:
    """Return by type what a forward pass may change and a checkpoint keeps, such as batch norm's statistics."""
    groups: dict[torch.dtype, dict[int, Tensor]] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                groups.setdefault(buffer.dtype, {})[id(buffer)] = buffer  # one that is shared counts once
    return {dtype: list(buffers.values()) for dtype, buffers in groups.items()}


def _host_copy(trainer: L.Trainer) -> Batch | None:
    """Return the batch of this step as the loader gave it, a quarter of its size, unless a subclass changes it later.

    Several of them wait for an accumulated step, where they would fill the device.
    """
    data = cast(Any, trainer).datamodule
    if not isinstance(data, DetectionData):
        return None
    own = type(data).on_after_batch_transfer is DetectionData.on_after_batch_transfer
    return data.last_batch if own else None


def _drop_gradients(optimizer: Optimizer) -> None:
    """Leave nothing to step with: optimisers pass over what has no gradient, momentum and decay included."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _report_silent(names: list[str], world_size: int) -> None:
    if not names:
        return
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    told = f"{len(names)} trainable parameters got no gradient in the first step, so no loss depends on them: {shown}"
    if world_size > 1:
        raise ValueError(f"{told}. Several processes wait for every gradient; freeze these or let a loss touch them")
    log.warning("%s. Freeze or remove them, or let a loss touch them", told)


def _scaler_handles(trainer: L.Trainer) -> bool:
    """Say whether the loss scaling will leave this step out and try a smaller scale, as it does by design."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def _agree(window: list[Seen], norm: float, world_size: int, rank: int) -> Verdict:
    """Say what was wrong; all ranks come here, as the gradients' norm is the same on all, and say the same."""
    bad = [seen for seen in window if seen.loss is not None and not bool(seen.loss.isfinite())]
    guilty = bad[:1] or window
    own = {"rank": rank, "bad": bool(bad), "loss": ", ".join(map(_loss, guilty)), "images": _names(guilty)}
    found: list[dict[str, Any]] = gather(own)
    spoilt = any(one["bad"] for one in found)
    named = [one for one in found if one["bad"]] if spoilt else found
    suffix = "" if world_size == 1 else " on rank {rank}"
    return Verdict(
        spoilt=spoilt,
        losses="; ".join(one["loss"] + suffix.format(**one) for one in named),
        norm=norm,
        images="; ".join(one["images"] for one in named),
        ranks=[one["rank"] for one in named],
    )


def _describe(verdict: Verdict) -> str:
    if verdict.spoilt:
        return f"the loss is {verdict.losses}"
    return f"the gradient is not finite (norm {verdict.norm}) at a loss of {verdict.losses}"


def _loss(seen: Seen) -> str:
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in seen.terms.items())
    return f"{float('nan') if seen.loss is None else float(seen.loss):.4g} ({terms})"


def _names(window: list[Seen], limit: int = 8) -> str:
    """Return the images' files, or ids where files have no name."""
    targets: list[Target] = [target for seen in window for target in seen.batch.targets]
    named = ", ".join(target.file or str(target.image_id) for target in targets[:limit])
    return named + (f" and {len(targets) - limit} more" if len(targets) > limit else "")
