"""Kill a training process with -9 while it saves, again and again; ``tests/test_durable.py`` starts this as a program.

Everything is imported once and the trials are forked, so that one takes a fraction of a second. Each trial goes on from
the newest valid checkpoint of the one before, as a user would.

    python tests/killed_saves.py <directory> <trials>         prints one line of JSON
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from detseg.callbacks.checkpoint import Checkpoint
from detseg.callbacks.durable_io import DurableIO
from detseg.durable import newest_valid, read_sealed
from tiny_task import TinyTask

import lightning as L  # isort: skip  # after the package, as its own import is the slow one

PATIENCE = 60.0  # seconds until a trial counts as hanging


class Ballast(TinyTask):
    """The tiny task with 4 MB of weights, so that writing takes long enough to be hit."""

    def __init__(self) -> None:
        super().__init__()
        self.ballast = torch.nn.Parameter(torch.arange(1e6))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.ballast.sum()


def train(directory: Path) -> None:
    """Train for ever, saving at each step."""
    callback = Checkpoint(dirpath=directory, monitor="val/map", last_every_n_steps=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=10**6,
        callbacks=[callback],
        plugins=[DurableIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=directory,
    )
    trainer.fit(Ballast(), ckpt_path=newest_valid(directory), weights_only=True)


def trial(directory: Path, rng: random.Random) -> bool:
    """Start, wait until a file is being written and a little more, kill; say whether it was being written still."""
    child = os.fork()
    if child == 0:
        try:
            train(directory)
        finally:
            os._exit(1)  # it never ends by itself
    try:
        deadline = time.monotonic() + PATIENCE
        seen = 0
        wanted = rng.randint(1, 6)  # which of its savings is hit
        known: set[str] = set()
        while seen < wanted:
            if time.monotonic() > deadline or os.waitpid(child, os.WNOHANG) != (0, 0):
                raise RuntimeError("the trial ended by itself or never saved")
            parts = {path.name for path in directory.glob(".*.part")} if directory.exists() else set()
            seen += len(parts - known)
            known |= parts
        time.sleep(rng.uniform(0, 0.008))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return any(directory.glob(".*.part"))


def main() -> None:
    directory, trials = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rng = random.Random(7)
    told: dict[str, Any] = {"hit": 0, "steps": [], "unreadable": 0, "orphans": 0}
    for _ in range(trials):
        told["hit"] += trial(directory, rng)
        newest = newest_valid(directory)
        told["orphans"] += len(list(directory.glob(".*.part")))
        if newest is None:
            told["steps"].append(told["steps"][-1] if told["steps"] else 0)
            continue
        content = read_sealed(newest)
        told["unreadable"] += not torch.equal(content["state_dict"]["ballast"], torch.arange(1e6))
        told["steps"].append(content["global_step"])
    told["files"] = sorted(path.name for path in directory.iterdir())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
