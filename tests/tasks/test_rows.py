"""Rows of figures: what reaches the loggers, when, and what it does not cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger

from detseg.structures import Target
from detseg.tasks import Detection
from detseg.tasks.rows import MeanRow, TrainRow, learning_rates
from fake_models import FakeDetector, batch, loader, trainer

EMPTY = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), image_id=1, size=(16, 16))


class Keeps(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.began: list[int] = []
        self.saved = 0

    name = version = "kept"

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *given: Any, **named: Any) -> None:
        pass

    def begin_at(self, step: int) -> None:
        self.began.append(step)

    def save(self) -> None:
        self.saved += 1


def make() -> Detection:
    optimizer = partial(torch.optim.AdamW, lr=0.1)
    return Detection(model=FakeDetector(), optimizer=optimizer, class_names=["a", "b"], monitor="val/map")


def batches(count: int) -> Any:
    return loader(*[batch([EMPTY])] * count)


class TestTrainRows:
    def test_one_row_per_due_step_with_the_rates_of_that_step(self, tmp_path: Path):
        keeps, task = Keeps(), make()
        runner = trainer(tmp_path, logger=keeps, log_every_n_steps=2, max_epochs=2)
        runner.fit(task, batches(3))
        assert [step for step, _ in keeps.rows] == [1, 3, 5] and keeps.began == [0]
        _, row = keeps.rows[1]
        assert {"train/loss", "train/loss_box", "train/positives_p3", "lr-AdamW/rest", "epoch"} <= set(row)
        assert row["epoch"] == 1 and row["lr-AdamW/rest"] == 0.1
        assert row["train/loss"] == pytest.approx(row["train/loss_box"] + row["train/loss_classification"], rel=1e-6)
        assert all(type(value) in (int, float) for value in row.values())

    @pytest.mark.parametrize(("every", "rows"), [(2, [1, 3, 5]), (10, [2, 5]), (0, [])])
    def test_short_epochs_have_a_row_each_and_zero_means_none(self, tmp_path: Path, every: int, rows: list[int]):
        keeps = Keeps()
        trainer(tmp_path, logger=keeps, log_every_n_steps=every, max_epochs=2).fit(make(), batches(3))
        assert [step for step, _ in keeps.rows] == rows

    def test_under_accumulation_the_mean_of_the_steps_batches(self, tmp_path: Path):
        keeps, task = Keeps(), make()
        sizes = [1, 3, 2, 2]
        task.model.diagnostics = lambda outputs, targets: {"n": torch.tensor(float(len(targets)))}
        runner = trainer(tmp_path, logger=keeps, accumulate_grad_batches=2)
        runner.fit(task, loader(*[batch([EMPTY] * size) for size in sizes]))
        assert [(step, row["train/n"]) for step, row in keeps.rows] == [(0, 2.0), (1, 2.0)]
        sizes[:] = [1, 4, 2, 3]
        keeps.rows.clear()
        trainer(tmp_path, logger=keeps, accumulate_grad_batches=2).fit(
            task, loader(*[batch([EMPTY] * size) for size in sizes])
        )
        assert [row["train/n"] for _, row in keeps.rows] == [2.5, 2.5]

    def test_callbacks_may_watch_train_figures(self, tmp_path: Path):
        """The loss rises without bound: it stops after one epoch without improvement."""
        task = make()
        losses = iter(range(100))
        task.model.diagnostics = lambda *_: {"rising": torch.tensor(float(next(losses)))}
        stop = EarlyStopping("train/rising", patience=1, check_on_train_epoch_end=True)
        runner = trainer(tmp_path, max_epochs=10, callbacks=[stop])
        runner.fit(task, batches(2))
        assert runner.current_epoch == 2 and float(stop.best_score) == 1
        assert float(runner.logged_metrics["train/rising"]) == 3

    def test_nothing_goes_through_self_log_in_training(self, tmp_path: Path):
        task, calls = make(), []
        task.log = lambda *given, **_: calls.append(given)
        task.log_dict = lambda *given, **_: calls.append(given)
        trainer(tmp_path, logger=Keeps(), limit_val_batches=0).fit(task, batches(4))
        assert calls == []

    def test_figures_are_on_disk_before_a_checkpoint(self, tmp_path: Path):
        keeps, task = Keeps(), make()
        runner = trainer(tmp_path, logger=keeps)
        runner.fit(task, batches(2))
        before = keeps.saved
        runner.save_checkpoint(tmp_path / "now.ckpt")
        assert keeps.saved == before + 1
        again = Keeps()
        trainer(tmp_path, logger=again, max_epochs=2).fit(make(), batches(2), ckpt_path=tmp_path / "now.ckpt")
        assert again.began == [2] and [step for step, _ in again.rows] == [2, 3]

    def test_a_checkpoint_right_after_a_step_comes_after_that_steps_row(self, tmp_path: Path):
        """Callbacks hear of a batch's end before the task does; killed then, a run goes on behind that step."""
        keeps, found = Keeps(), []

        class Saves(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                trainer.save_checkpoint(tmp_path / "now.ckpt")
                found.append((trainer.global_step, [step for step, _ in keeps.rows]))

        trainer(tmp_path, logger=keeps, accumulate_grad_batches=2, callbacks=[Saves()]).fit(make(), batches(4))
        assert found == [(0, []), (1, [0]), (1, [0]), (2, [0, 1])]
        assert [step for step, _ in keeps.rows] == [0, 1]

    def test_a_row_waits_for_the_optimiser(self, tmp_path: Path):
        class Runs:
            global_step, current_epoch, world_size, is_global_zero = 4, 0, 1, True
            callback_metrics: dict[str, Any] = {}  # noqa: RUF012
            logged_metrics: dict[str, Any] = {}  # noqa: RUF012
            optimizers: list[Any] = []  # noqa: RUF012

        runs: Any = Runs()
        runs.loggers, row = [Keeps()], TrainRow()
        row.add(runs, {"a": torch.tensor(1, dtype=torch.int64), "b": torch.tensor(0.5, dtype=torch.bfloat16)})
        row.step_done(runs)
        assert runs.loggers[0].rows == []
        runs.global_step = 5
        row.step_done(runs)
        row.step_done(runs)
        assert runs.loggers[0].rows == [(4, {"a": 1.0, "b": 0.5, "epoch": 0})]


def test_names_of_learning_rates():
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    assert learning_rates([torch.optim.SGD([one], lr=0.5)]) == {"lr-SGD": 0.5}
    groups = [{"params": [one], "lr": 0.1, "name": "body"}, {"params": [two]}]
    assert learning_rates([torch.optim.Adam(groups, lr=0.2)]) == {"lr-Adam/body": 0.1, "lr-Adam/pg2": 0.2}
    assert learning_rates([]) == {}


def test_means_are_weighted_by_images_and_start_anew():
    row = MeanRow()
    row.add({"loss": torch.tensor(1.0), "n": torch.tensor(2)}, images=3)
    row.add({"loss": torch.tensor(float("nan"))}, images=0)
    row.add({"loss": torch.tensor(5.0), "n": torch.tensor(4)}, images=1)
    row.add({"other": torch.tensor(7.0), "loss": torch.tensor(2.0)}, images=4)
    assert row.take() == {"loss": (3 + 5 + 8) / 8, "n": 2.5, "other": 7.0}
    assert row.take() == {}


def test_means_are_exact_over_many_batches():
    row = MeanRow()
    for _ in range(1000):
        row.add({"loss": torch.tensor(0.1)}, images=16)
    assert row.take()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
