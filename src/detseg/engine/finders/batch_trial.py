"""One batch size, tried in a process of its own, which may die of it: ``python -m detseg.engine.finders.batch_trial``.

Two optimiser steps on the worst batch: from the second on there is the optimiser's state too.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detseg.config import build_task, build_trainer
from detseg.engine.explain import is_out_of_memory
from detseg.engine.finders.worst_batch import WorstData, read_worst

KEPT = ("ema", "compile")
"""Callbacks that need memory of their own; frozen parts would hide what training needs later."""

ONEDNN = ("could not create a primitive", "could not create a memory")
"""What oneDNN says where it finds no memory, and elsewhere; of a model that trained with fewer images it is memory."""

UNLIMITED = 10_000
"""Proposals of an image where nothing limits them; about as many as selective search makes of a full photo."""

CUDNN = "unable to find an engine to execute this computation"
"""What cuDNN says where no kernel's workspace fits, and elsewhere; taken as oneDNN's words are."""


def main(arguments: list[str] | None = None) -> int:
    """Try, and write what came out as JSON; return 0 where there is a result, also one of too little memory."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--worst", "--result"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--limit", type=int, default=0, help="bytes that this process may take; 0: no limit")
    parser.add_argument("--share", type=float, default=1.0, help="of the GPU's memory that it may take")
    given = parser.parse_args(arguments)
    confine(given.limit)
    try:
        result = attempt(cast(DictConfig, OmegaConf.load(given.config)), given.worst, given.images, given.share)
    except Exception as error:
        logging.getLogger(__name__).exception("trial of %d images", given.images)
        kind = "memory" if means_memory(error) else "error"
        result = {kind: f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
    given.result.write_text(json.dumps(result), encoding="utf-8")
    return 0


def confine(limit: int) -> None:
    """Keep this process to ``limit`` bytes, and let the system end it before any other when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:  # not Linux
        return
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def attempt(cfg: DictConfig, worst_file: Path, images: int, share: float) -> dict[str, Any]:
    """Take two steps with ``images`` images; return peak memory in bytes and seconds of the second step."""
    steps, accumulated = 2, min(2, cfg.trainer.accumulate_grad_batches)
    prepare(cfg, steps, accumulated)
    task = build_task(cfg, class_names=list(cfg.find.class_names))
    data = WorstData(
        worst=read_worst(worst_file),
        batch_size=images,
        size_divisor=cfg.data.size_divisor,
        batches=steps * accumulated,
        proposals=most_proposals(task.model),
    )
    trainer = build_trainer(cfg)
    place = trainer.strategy.root_device
    if place.type == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share, place)
    clock = Clock()
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]  # a list; Lightning types it away
    trainer.fit(task, datamodule=data)
    return {"bytes": peak_memory(place), "seconds": clock.last}


def most_proposals(model: nn.Module) -> int | None:
    """Return how many proposals an image may bring to a model; ``None`` for one that makes its own."""
    proposer = getattr(model, "proposer", None)
    return None if proposer is None else int(getattr(proposer, "limit", None) or UNLIMITED)


def prepare(cfg: DictConfig, steps: int, accumulated: int) -> None:
    """Make the config train for a few steps in this process alone and leave nothing behind."""
    callbacks = cfg.get("callbacks") or {}
    cfg.callbacks = {name: callbacks[name] for name in KEPT if callbacks.get(name) is not None}
    cfg.logger = cfg.resume = cfg.init_from = None
    cfg.trainer.update(max_steps=steps, max_epochs=1, max_time=None, accumulate_grad_batches=accumulated)
    cfg.trainer.update(limit_train_batches=None, limit_val_batches=0, num_sanity_val_steps=0, overfit_batches=0.0)
    cfg.trainer.update(enable_checkpointing=False, enable_progress_bar=False, fast_dev_run=False)
    cfg.trainer.update(devices=first_device(cfg.trainer.devices), num_nodes=1, strategy="auto")


def first_device(devices: Any) -> Any:
    """Return what has Lightning use one device: the first of those that the config names, else any."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip()]
    return 1 if isinstance(devices, str | int) else list(devices)[:1]


def means_memory(error: BaseException) -> bool:
    """Say whether an error means that there was too little memory."""
    text = str(error)
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and (text.startswith(ONEDNN) or CUDNN in text))


def peak_memory(place: torch.device) -> int:
    """Return the most bytes that this process has taken: of ``place`` where that is a GPU, else of the machine."""
    if place.type == "cuda":
        return int(torch.cuda.max_memory_reserved(place))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


class Clock(L.Callback):
    """Times every batch; ``last`` is that of the last one, in seconds."""

    def __init__(self) -> None:
        self.last = self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop, when the GPU is done too."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.last = time.perf_counter() - self._start


if __name__ == "__main__":
    sys.exit(main())
