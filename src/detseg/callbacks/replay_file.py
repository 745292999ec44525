"""The file that replays a step: what it holds, gathered over the processes, written whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from detseg.callbacks.stamp import stamp_of
from detseg.durable import write_sealed
from detseg.stamp import STAMP_KEY
from detseg.structures import Batch
from detseg.structures.plain import to_plain

REPLAY_FORMAT = 1
"""Grows when a reader would have to change."""


@dataclass
class Seen:
    """One batch of an optimiser step.

    Attributes:
        batch: in host memory.
        cpu: state of torch's random numbers before the batch's forward pass.
        cuda: the same on the GPU in use; ``None`` without one.
        terms: the loss terms, detached; empty until they are known.
        loss: their sum.
    """

    batch: Batch
    cpu: Tensor
    cuda: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


def plain_window(window: list[Seen], rank: int) -> dict[str, Any]:
    """Return the batches of one rank's step as plain values in host memory.

    Losses are text: a checkpoint or replay file of a run never holds NaN among its numbers.
    """
    batches = [
        {
            "batch": to_plain(seen.batch.cpu()),
            "cpu": seen.cpu,
            "cuda": seen.cuda,
            "terms": {name: str(float(value)) for name, value in seen.terms.items()},
        }
        for seen in window
    ]
    return {"rank": rank, "batches": batches}


def gather_windows(window: list[Seen], ranks: list[int], world_size: int, rank: int) -> list[dict[str, Any]]:
    """Return on rank 0 the windows of ``ranks``; every rank calls this."""
    own = plain_window(window, rank) if rank in ranks else None
    if world_size == 1:
        return [] if own is None else [own]
    found: list[dict[str, Any] | None] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(own, found, dst=0)
    return [one for one in found or [] if one is not None]


def write_replay(
    path: Path,
    *,
    trainer: L.Trainer,
    task: L.LightningModule,
    state: dict[str, Any],
    windows: list[dict[str, Any]],
    cause: dict[str, str],
) -> Path:
    """Write a replay file and return its path.

    Args:
        path: where to.
        trainer: of the run.
        task: of the run; says which of its modules do not train.
        state: the task's weights before the step.
        windows: of ``gather_windows``.
        cause: what was found, in words.

    Raises:
        OSError: it cannot be written; nothing is left at ``path`` then.
    """
    model = cast(torch.nn.Module, task.model)
    content = {
        "replay": REPLAY_FORMAT,
        STAMP_KEY: stamp_of(trainer, task),
        "state_dict": {
            _eager(name): value.detach().cpu() for name, value in state.items() if name.startswith("model.")
        },
        "windows": windows,
        "cause": cause,
        "global_step": int(task.global_step),
        "epoch": int(task.current_epoch),
        "precision": str(trainer.precision),
        "device": task.device.type,
        "accumulate": int(trainer.accumulate_grad_batches),
        "world_size": int(trainer.world_size),
        "evaluating": [_eager(name) for name, module in model.named_modules() if not module.training],
        "frozen": [_eager(name) for name, weight in model.named_parameters() if not weight.requires_grad],
    }
    write_sealed(content, path)
    return path


def _eager(name: str) -> str:
    """Return the name that a module or weight has before ``torch.compile`` wraps it."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")
