"""Which checkpoints a run keeps: the best by its figure, and the last, from which it goes on.

Built on Lightning's ``ModelCheckpoint``, whose hooks and attributes other callbacks and loggers know. What differs in
2.6: there ``last.ckpt`` is written only when a best one is, in full a second time; a run directory that moved loses its
best score, so that a worse checkpoint becomes the best; a full disk leaves the first process in an error and the others
waiting.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import proxy

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from detseg.callbacks.durable_io import LAST, DurableIO, previous_of
from detseg.durable import Damaged, check_seal, link_or_copy, sweep

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Checkpoint(ModelCheckpoint):
    """Keep the checkpoints with the best figures, and the last one with the one before it.

    Files, all below ``dirpath``: ``last.ckpt`` and ``last-1.ckpt``, the one before it, for the case that ``last.ckpt``
    is damaged; ``best.ckpt``. With ``save_top_k`` other than 1 also ``best-<epoch>-<step>.ckpt``, and ``best.ckpt`` is
    another name of the best of these. Where the best is the last, both names lead to one file, written once.

    The best figures go with the checkpoint. A run that goes on in another directory, or whose directory was moved,
    brings the files of its best along (as hard links, or copies); one that is gone is forgotten with its figure.

    Args:
        dirpath: where the files go.
        filename: of the best, without ending.
        monitor: figure that is compared; ``None``: the latest counts as the best.
        mode: whether ``"max"`` or ``"min"`` is better. NaN is worse than all else.
        save_top_k: how many are kept by the figure; -1 all, 0 none.
        save_last: keep the last too, at the end of each epoch and each validation.
        every_n_epochs: epochs between two comparisons; ``last.ckpt`` does not wait for them.
        last_every_n_steps: optimiser steps between two writings of ``last.ckpt`` within an epoch; ``None``: none.
        last_every_n_minutes: minutes after which ``last.ckpt`` is written again within an epoch; ``None``: never.

    Raises:
        ValueError: a count is not positive.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path | None = None,
        filename: str = "best",
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_epochs: int = 1,
        last_every_n_steps: int | None = None,
        last_every_n_minutes: float | None = None,
    ) -> None:
        counts = {"last_every_n_steps": last_every_n_steps, "last_every_n_minutes": last_every_n_minutes}
        for name, count in {"every_n_epochs": every_n_epochs, **counts}.items():
            if count is not None and count <= 0:
                raise ValueError(f"Checkpoint: {name} must be positive, got {count}; null switches it off")
        super().__init__(
            dirpath=dirpath,
            filename=filename if save_top_k == 1 or "{" in filename else f"{filename}-{{epoch:03d}}-{{step}}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor is not None else min(save_top_k, 1),
            save_last=save_last,
            every_n_epochs=every_n_epochs,
            auto_insert_metric_name=False,  # names such as val/map would become folders
            enable_version_counter=False,  # every run has its own directory
        )
        self.best_name = filename.partition("{")[0].rstrip("-_") or "best"
        self.last_every_n_steps, self.last_every_n_minutes = last_every_n_steps, last_every_n_minutes
        self._counted = 0  # the optimiser step at which the triggers within an epoch were looked at
        self._written = time.monotonic()  # when last.ckpt was written
        self._looked = 0, self._written  # the step at which the first process's clock was looked at, and when
        self._look_at = 0  # the step at which it is again
        self._trainer: L.Trainer | None = None  # while a checkpoint is being loaded

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the directory, and remove from it what a killed run was writing."""
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero:
            sweep(self.dirpath)
        plugin = trainer.strategy.checkpoint_io
        if not isinstance(plugin, DurableIO):
            raise TypeError(
                f"detseg.callbacks.Checkpoint writes through DurableIO, the trainer has {type(plugin).__name__}; "
                "give Trainer(plugins=[detseg.callbacks.DurableIO()])"
            )
        with warnings.catch_warnings():  # a run that goes on in its own directory finds its files there
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self.last_model_path = self._path(LAST) if self.save_last else ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting steps and minutes."""
        self._counted, self._written = trainer.global_step, time.monotonic()
        self._looked, self._look_at = (self._counted, self._written), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last checkpoint within an epoch where it is due, always right after an optimiser step."""
        step = trainer.global_step
        if step == self._counted or not self.save_last or self._should_skip_saving_checkpoint(trainer):
            return
        self._counted = step
        due = self.last_every_n_steps is not None and step % self.last_every_n_steps == 0
        if due or self._time_is_up(trainer):
            self.write_last(trainer)

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        """Look at the first process's clock: of several, at each step that is half way to when it will be up.

        Telling the others makes every process wait for its device, which in each step would cost more than saving.
        """
        if self.last_every_n_minutes is None or trainer.global_step < self._look_at:
            return False
        now = time.monotonic()
        left = 60 * self.last_every_n_minutes - (now - self._written)
        if trainer.world_size > 1:
            (step, then), self._looked = self._looked, (trainer.global_step, now)
            pace = (now - then) / max(1, trainer.global_step - step)  # seconds
            ahead = max(1, int(left / 2 / pace)) if left > 0 and pace > 0 else 1
            left, ahead = trainer.strategy.broadcast((left, ahead))
            self._look_at = trainer.global_step + ahead
        return left <= 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare and write, where validation is not the last thing in an epoch."""
        if not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer, compare=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare and write; after an epoch without validation write alone."""
        self._save(trainer, compare=self._should_save_on_train_epoch_end(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint of a run that ended within an epoch."""
        self._save(trainer, compare=False)

    def write_last(self, trainer: L.Trainer) -> Path | None:
        """Write ``last.ckpt`` now, whatever was written before; every process must call it.

        Returns:
            The file, or ``None`` where none is kept.

        Raises:
            FloatingPointError: weights or optimiser state hold NaN or infinity.
            WriteFailed: the disk is full, read-only or broken.
        """
        if not self.save_last:
            return None
        self._write(trainer, self.last_model_path)
        self._written = time.monotonic()
        return Path(self.last_model_path)

    def crown(self, trainer: L.Trainer, content: dict[str, Any]) -> None:
        """Write a checkpoint as the last and as the best, whatever the figures say: a stage after training made it.

        Its figure counts as NaN, so that training that goes on from it finds a better one at its first validation.

        Args:
            trainer: of one process.
            content: of the checkpoint; what it says of the best files is set here.

        Raises:
            WriteFailed: the disk is full, read-only or broken.
        """
        best = self._path(self.best_name) if self.save_top_k != 0 else None
        if best is not None:
            self._rank({best: math.nan})
        content["callbacks"] = {**content.get("callbacks", {}), self.state_key: self.state_dict()}
        paths = [path for path in (self.last_model_path, best) if path]
        for path in paths[:1]:
            trainer.strategy.checkpoint_io.save_checkpoint(content, path)
        for path in paths[1:]:
            self._link(paths[0], path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best files by name with their figures, as plain values."""
        return {
            "dirpath": str(self.dirpath),
            "best": {os.path.basename(path): float(score) for path, score in self.best_k_models.items()},
            "current_score": None if self.current_score is None else float(self.current_score),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember who loads, for ``load_state_dict``, which Lightning calls next."""
        self._trainer = trainer

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best figures and bring their files along; outside training there is nothing to restore."""
        trainer, self._trainer = self._trainer, None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        places = [Path(str(self.dirpath)), Path(state_dict["dirpath"]), Path(str(trainer.ckpt_path)).parent]
        names = _on_first(trainer, lambda: [name for name in state_dict["best"] if self._bring(name, places)])
        self._rank({self._path(name.removesuffix(self.FILE_EXTENSION)): state_dict["best"][name] for name in names})
        if names:
            _on_first(trainer, lambda: self._tidy([], None))
        score = state_dict["current_score"]
        self.current_score = None if score is None else torch.tensor(score)

    def _bring(self, name: str, places: list[Path]) -> bool:
        """Let the file ``name`` lie in the run's own directory; say whether it was found whole in one of ``places``."""
        for place in places:
            try:
                check_seal(place / name)
            except (Damaged, OSError) as error:
                log.debug("not brought along: %s", error)
                continue
            if place != places[0]:
                places[0].mkdir(parents=True, exist_ok=True)
                link_or_copy(place / name, places[0] / name)
            return True
        log.warning("%s, kept as one of the best, is gone or damaged: its figure counts no more", name)
        return False

    def _save(self, trainer: L.Trainer, *, compare: bool) -> None:
        """Write what is due at this moment, unless it was written at this step already."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        best = None
        if compare and self.save_top_k != 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            best = self._save_best(trainer)
        if self.save_last and best is not None:
            _on_first(trainer, lambda: self._link(best, self.last_model_path))
            self._written = time.monotonic()
        elif self.save_last:
            self.write_last(trainer)
        if self.save_last or best is not None:
            self._last_global_step_saved = trainer.global_step
            self._last_checkpoint_saved = best or self.last_model_path
            for logger in trainer.loggers if trainer.is_global_zero else []:
                logger.after_save_checkpoint(proxy(self))

    def _save_best(self, trainer: L.Trainer) -> str | None:
        """Write a checkpoint if its figure is among the best; return its path."""
        candidates = self._monitor_candidates(trainer)
        score = self._score(trainer, candidates)
        if score is None or not self._enters(score):
            return None
        path, before = self.format_checkpoint_name(candidates), dict(self.best_k_models)
        kept = sorted(before, key=lambda key: self._worth(float(before[key])), reverse=True)
        dropped = [key for key in kept[max(self.save_top_k - 1, 0) :] if key != path] if self.save_top_k > 0 else []
        self.current_score = torch.tensor(score)
        self._rank({**{key: float(before[key]) for key in before if key not in dropped}, path: score})
        try:
            self._write(trainer, path)  # holds the ranks, so they come first
        except (OSError, FloatingPointError):
            self._rank({key: float(value) for key, value in before.items()})
            raise
        _on_first(trainer, lambda: self._tidy(dropped, trainer.ckpt_path))
        return path

    def _score(self, trainer: L.Trainer, candidates: Mapping[str, Any]) -> float | None:
        """Return the first process's figure, or ``None`` where nothing was measured."""
        if self.monitor is None:
            return float(trainer.global_step if self.mode == "max" else -trainer.global_step)
        if self.monitor in candidates:
            return trainer.strategy.broadcast(float(candidates[self.monitor]))
        if trainer.fit_loop.epoch_loop.val_loop._has_run:
            near = difflib.get_close_matches(self.monitor, candidates, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor}: no such figure.{hint} There are {', '.join(candidates)}"
            )
        log.warning("nothing was validated, so there is no best checkpoint by %s", self.monitor)
        return None

    def _worth(self, score: float) -> float:
        """Return a figure so that more is better and NaN is worst."""
        return -math.inf if math.isnan(score) else score if self.mode == "max" else -score

    def _enters(self, score: float) -> bool:
        scores = [self._worth(float(value)) for value in self.best_k_models.values()]
        return self.save_top_k == -1 or len(scores) < self.save_top_k or self._worth(score) > min(scores)

    def _rank(self, scores: Mapping[str, float]) -> None:
        """Set what is known of the best files: path to figure."""
        self.best_k_models = {path: torch.tensor(score) for path, score in scores.items()}
        order = sorted(scores, key=lambda path: self._worth(scores[path]), reverse=True)
        self.best_model_path = order[0] if order else ""
        self.best_model_score = self.best_k_models[order[0]] if order else None
        if order:
            self.kth_best_model_path, self.kth_value = order[-1], self.best_k_models[order[-1]]

    def _tidy(self, dropped: list[str], resumed: str | Path | None) -> None:
        """Remove files that are no longer among the best, and let ``best.ckpt`` name the best one."""
        alias = self._path(self.best_name)
        if self.best_model_path != alias:
            link_or_copy(self.best_model_path, alias)
        for path in dropped:
            if resumed is None or os.path.realpath(path) != os.path.realpath(resumed):
                Path(path).unlink(missing_ok=True)

    def _link(self, source: str, target: str) -> None:
        link_or_copy(source, target, previous=previous_of(target))

    def _write(self, trainer: L.Trainer, path: str) -> None:
        """Write the state of the run; what goes wrong in the first process is raised in all."""
        plugin = cast(DurableIO, trainer.strategy.checkpoint_io)
        with plugin.collected() as failures:
            trainer.save_checkpoint(path, self.save_weights_only)
        _on_first(trainer, lambda: _raise(failures))

    def _path(self, name: str) -> str:
        return os.path.join(str(self.dirpath), f"{name}{self.FILE_EXTENSION}")


def _on_first(trainer: L.Trainer, work: Callable[[], Result]) -> Result:
    """Run ``work`` in the first process; all get its result, or raise its error."""
    result: Any = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if trainer.world_size > 1:
        result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        raise error
    return cast(Result, result)


def _raise(failures: list[Exception]) -> None:
    if failures:
        raise failures[0]
