"""Every logger of conf/logger writes a real run into the run's own directory, without a network."""

from __future__ import annotations

import csv
import sqlite3
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from detseg.callbacks import CheckpointStamp, wandb_logger
from detseg.callbacks.loggers import has_wandb_login
from tiny_task import TinyTask, fit


def loggers(choice: str, directory: Path) -> list:
    """Build what a choice in conf/logger describes, as detseg.build does."""
    with initialize_config_module(config_module="detseg.conf", version_base="1.3"):
        whole = compose(overrides=[f"+logger={choice}", f"+paths.output_dir={directory}", "+name=orchard-fcos"])
    OmegaConf.resolve(whole)
    return [instantiate(node, _convert_="all") for node in whole.logger.values()]


def run(choice: str, directory: Path) -> float:
    config = {"model": {"width": 12, "sizes": [[32], [64]]}, "resume": None}
    stamp = CheckpointStamp(config=config)
    trainer = fit(TinyTask(), directory, stamp, logger=loggers(choice, directory) or False)
    return float(trainer.callback_metrics["val/map"])


def test_csv(tmp_path):
    figure = run("csv", tmp_path)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float([row["val/map"] for row in rows if row["val/map"]][-1]) == pytest.approx(figure, rel=1e-5)
    assert len([row for row in rows if row["train/loss"]]) == 12
    assert "width: 12" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = run("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 12
    assert events.Scalars("val/map")[-1].value == pytest.approx(figure, rel=1e-5)
    assert "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    run("wandb", tmp_path)
    run("wandb", tmp_path / "second")  # as the next trial of a sweep: a run of its own
    wandb.finish()
    assert len(list((tmp_path / "second" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert b"val/map" in content and b"orchard-fcos" in content and b"width" in content


@pytest.mark.slow
def test_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="an extra: pip install detseg[mlflow]")
    figure = run("mlflow", tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        values = store.execute("select value from metrics where key = 'val/map' order by step").fetchall()
        settings = dict(store.execute("select key, value from params").fetchall())
        names = store.execute("select name from experiments").fetchall()
    assert len(values) == 2 and values[-1][0] == pytest.approx(figure, rel=1e-5)
    assert ("orchard-fcos",) in names
    assert settings["model/width"] == "12"


def test_many_and_none(tmp_path):
    kinds = [type(logger).__name__ for logger in loggers("many", tmp_path)]
    assert kinds == ["CSVLogger", "TensorBoardLogger", "WandbLogger"]
    assert loggers("none", tmp_path) == []


def test_login_is_looked_for_in_the_settings_alone(monkeypatch, tmp_path):
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "login", lambda **settings: asked.append(settings) or True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not has_wandb_login()
    monkeypatch.delenv("WANDB_MODE")
    assert has_wandb_login()
    assert asked == [{"prompt": False, "verify": False}]
    assert wandb_logger(save_dir=tmp_path / "new", log_model=True)._offline is False
    assert wandb_logger(save_dir=tmp_path, offline=True, log_model=True)._log_model is False
    assert (tmp_path / "new").is_dir()
