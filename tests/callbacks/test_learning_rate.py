from __future__ import annotations

import csv

from lightning.pytorch.loggers import CSVLogger

from detseg.callbacks import LearningRate
from tiny_task import TinyTask, fit


def test_logs_every_step(tmp_path):
    fit(TinyTask(lr=0.03), tmp_path, LearningRate(logging_interval="step"), logger=CSVLogger(tmp_path, "", ""))
    with (tmp_path / "metrics.csv").open() as file:
        rates = [row["lr-SGD"] for row in csv.DictReader(file) if row["lr-SGD"]]
    assert len(rates) == 12
    assert {float(rate) for rate in rates} == {0.03}


def test_is_silent_without_a_logger(tmp_path):
    trainer = fit(TinyTask(), tmp_path, LearningRate(), logger=False)
    assert trainer.current_epoch == 2
