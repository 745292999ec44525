"""Stopping trials of a search that fall behind: what a trial of ``detseg tune`` brings along in all its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L

from detseg.storage import PRUNED, open_storage

if TYPE_CHECKING:
    from optuna.study import Study


class Pruning(L.Callback):
    """Report the figure of every epoch to the study and stop where the pruner says so.

    The study's storage is what trials share; the first process of a run talks to it and tells the others. After the
    last epoch nothing is stopped, as nothing would be saved.

    Args:
        storage: URL of Optuna's storage, such as ``"sqlite:///study.db"``.
        study: its name there.
        trial: number of the trial.
        monitor: logged figure to report.
        after_trials: finished trials before anything is stopped.
        after_epochs: epochs that every run may train.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(
        self, *, storage: str, study: str, trial: int, monitor: str, after_trials: int = 5, after_epochs: int = 2
    ) -> None:
        self.storage, self.study, self.trial, self.monitor = storage, study, trial, monitor
        self.after_trials, self.after_epochs = after_trials, after_epochs
        self.pruned = False
        self._opened: tuple[Study, Any, int] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, and stop all processes of the run where it is behind."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor not in trainer.callback_metrics:
            return
        epoch = trainer.current_epoch + 1
        behind = trainer.is_global_zero and self.report(epoch, float(trainer.callback_metrics[self.monitor]))
        last = trainer.max_epochs is not None and epoch >= trainer.max_epochs > 0
        if not last and trainer.strategy.broadcast(behind):
            self.pruned = trainer.should_stop = True
            if trainer.is_global_zero:
                self.stop(epoch)

    def report(self, epoch: int, value: float) -> bool:
        """Note the figure of an epoch, from 1; return whether the pruner would stop here."""
        study, storage, number = self._open()
        storage.set_trial_intermediate_value(number, epoch, value)
        return bool(study.pruner.prune(study, storage.get_trial(number)))

    def stop(self, epoch: int) -> None:
        """Note that the trial was stopped after ``epoch``."""
        _, storage, number = self._open()
        storage.set_trial_user_attr(number, PRUNED, epoch)

    def _open(self) -> tuple[Study, Any, int]:
        """Return the study, its storage and the trial's number in the storage, opened when first needed."""
        if self._opened is None:
            import optuna

            storage: Any = open_storage(self.storage)
            pruner = optuna.pruners.MedianPruner(n_startup_trials=self.after_trials, n_warmup_steps=self.after_epochs)
            study = optuna.load_study(study_name=self.study, storage=storage, pruner=pruner)
            place = storage.get_study_id_from_name(self.study)
            self._opened = study, storage, storage.get_trial_id_from_study_id_trial_number(place, self.trial)
        return self._opened


def was_pruned(trainer: L.Trainer) -> bool:
    """Say whether a run was stopped because it was behind others."""
    return any(isinstance(callback, Pruning) and callback.pruned for callback in trainer.callbacks)  # type: ignore[attr-defined]
