"""Runs that report to a study, stop where they are behind, and only there."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from detseg.callbacks.pruning import Pruning, was_pruned
from detseg.storage import PRUNED, open_storage
from tiny_task import TinyTask, fit


class Falling(TinyTask):
    """Its figure is what the test says, by epoch."""

    figures = (0.1, 0.1, 0.1, 0.1)

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val/map", self.figures[self.current_epoch])


def study(tmp_path: Path, others: int) -> str:
    """A study in which ``others`` trials reached 0.5 in each of four epochs, and one is running."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    built = optuna.create_study(study_name="s", storage=open_storage(url), direction="maximize")
    for _ in range(others):
        space, values = {"x": FloatDistribution(0, 1)}, dict.fromkeys(range(1, 5), 0.5)
        built.add_trial(create_trial(params={"x": 0.5}, distributions=space, value=0.5, intermediate_values=values))
    assert built.ask({"x": FloatDistribution(0, 1)}).number == others
    return url


def run(tmp_path: Path, others: int, **arguments) -> tuple[L.Trainer, optuna.trial.FrozenTrial]:
    url = study(tmp_path, others)
    pruning = Pruning(storage=url, study="s", trial=others, monitor="val/map", **arguments)
    trainer = fit(Falling(), tmp_path, pruning, epochs=4)
    return trainer, optuna.load_study(study_name="s", storage=url).trials[others]


@pytest.mark.parametrize(("after_epochs", "epochs"), [(1, 1), (2, 2), (3, 3)])
def test_a_run_that_is_behind_stops_after_the_epochs_that_it_may_train(tmp_path: Path, after_epochs: int, epochs: int):
    trainer, trial = run(tmp_path, 5, after_epochs=after_epochs)
    assert trainer.current_epoch == epochs and was_pruned(trainer)
    assert trial.intermediate_values == dict.fromkeys(range(1, epochs + 1), pytest.approx(0.1))
    assert trial.user_attrs == {PRUNED: epochs} and trial.state == TrialState.RUNNING


def test_nothing_stops_before_others_have_ended_or_after_the_last_epoch(tmp_path: Path):
    (tmp_path / "a").mkdir()
    trainer, trial = run(tmp_path, 4)
    assert trainer.current_epoch == 4 and not was_pruned(trainer) and trial.user_attrs == {}
    trainer, trial = run(tmp_path / "a", 5, after_epochs=4)
    assert trainer.current_epoch == 4 and not was_pruned(trainer) and len(trial.intermediate_values) == 4


def test_a_run_that_is_ahead_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Falling, "figures", (0.6, 0.6, 0.1, 0.1))
    trainer, trial = run(tmp_path, 5)
    assert trainer.current_epoch == 4, "the best epoch so far counts"
    assert trial.intermediate_values[4] == pytest.approx(0.1)


def test_a_figure_that_is_not_logged_is_left_alone(tmp_path: Path):
    url = study(tmp_path, 5)
    trainer = fit(Falling(), tmp_path, Pruning(storage=url, study="s", trial=5, monitor="val/no"), epochs=1)
    assert trainer.current_epoch == 1 and not was_pruned(trainer)
    assert optuna.load_study(study_name="s", storage=url).trials[5].intermediate_values == {}
