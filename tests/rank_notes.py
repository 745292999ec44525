"""A callback that writes down what each process of a run trains with."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from detseg.callbacks import CheckpointStamp


class RankNotes(L.Callback):
    """Write ``rank_<n>.json``: the optimiser's rates and the config that this process was built from."""

    def __init__(self, *, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (stamp,) = [callback for callback in trainer.callbacks if isinstance(callback, CheckpointStamp)]
        rates = [group["initial_lr"] for group in trainer.optimizers[0].param_groups]
        note = {"rates": rates, "config": stamp.config, "world": trainer.world_size}
        (self.dirpath / f"rank_{trainer.global_rank}.json").write_text(json.dumps(note, default=str))
