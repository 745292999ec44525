"""The callback that stamps checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning as L

from detseg.secrecy import veil
from detseg.stamp import STAMP_KEY, make_stamp, plain


class CheckpointStamp(L.Callback):
    """Write into every checkpoint what ``detseg.load`` needs to rebuild the model, and where it came from.

    The stamp (``detseg.stamp.make_stamp``) lies under the key ``"detseg"``. Every logger gets the config too, so that a
    dashboard can sort and group runs by its keys.

    Args:
        config: the whole resolved config as plain values. Default: the task's ``config``, which ``detseg.build`` sets.
            Without either (a model built by hand) the checkpoint holds the rest, and ``detseg.load`` says what is
            missing.
    """

    def __init__(self, *, config: Mapping[str, Any] | None = None) -> None:
        self.config = config

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the loggers the config."""
        config = _first("config", self, pl_module)
        for logger in trainer.loggers if config is not None else []:
            logger.log_hyperparams(veil(plain(config, "config")))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the stamp."""
        checkpoint[STAMP_KEY] = stamp_of(trainer, pl_module, _first("config", self, pl_module))


def stamp_of(trainer: L.Trainer, pl_module: L.LightningModule, config: Mapping[str, Any] | None = None) -> Any:
    """Return the stamp of a run, see ``detseg.stamp.make_stamp``.

    Args:
        trainer: of the run.
        pl_module: its task.
        config: default: that of the run's ``CheckpointStamp``, else the task's, else none.
    """
    data = getattr(trainer, "datamodule", None)
    stamps = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, CheckpointStamp)]
    return make_stamp(
        _first("config", *stamps, pl_module) if config is None else config,
        class_names=_first("class_names", data, pl_module),
        category_ids=_first("category_ids", data, pl_module),
        num_classes=_first("num_classes", getattr(pl_module, "model", None), data),
    )


def _first(name: str, *owners: object) -> Any:
    """Return the first attribute ``name`` among ``owners`` that exists and is not ``None``."""
    values = (getattr(owner, name, None) for owner in owners)
    return next((value for value in values if value is not None), None)
