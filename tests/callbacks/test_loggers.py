"""The loggers of conf/logger: what they write, what they cost to continue, and how they end."""

from __future__ import annotations

import csv
import math
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from detseg.callbacks import CheckpointStamp, CsvLog, EventLog, MlflowLog, wandb_logger
from detseg.callbacks.handover import Handover
from detseg.callbacks.loggers import closing, exit_code
from detseg.callbacks.trackers import Identity, has_wandb_login, metric_name
from tiny_task import TinyTask, fit
from tracker_files import read_csv, read_tensorboard, wandb_records


def loggers(choice: str, directory: Path) -> list:
    """Build what a choice in conf/logger describes, as detseg.build does."""
    with initialize_config_module(config_module="detseg.conf", version_base="1.3"):
        paths = [f"+paths.output_dir={directory}", f"+paths.root={directory.parent}"]
        whole = compose(overrides=[f"+logger={choice}", *paths, "+name=orchard-fcos"])
    OmegaConf.resolve(whole)
    return [instantiate(node, _convert_="all") for node in whole.logger.values()]


def run(choice: str, directory: Path) -> float:
    config = {"model": {"width": 12, "sizes": [[32], [64]]}, "resume": None}
    stamp = CheckpointStamp(config=config)
    trainer = fit(TinyTask(), directory, stamp, logger=loggers(choice, directory) or False)
    return float(trainer.callback_metrics["val/map"])


class TestCsv:
    def test_a_run(self, tmp_path):
        figure = run("csv", tmp_path)
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert float([row["val/map"] for row in rows if row["val/map"]][-1]) == pytest.approx(figure, rel=1e-5)
        assert len([row for row in rows if row["train/loss"]]) == 12
        assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())["model"]["width"] == 12

    def test_new_figures_become_columns_and_rows_wait_for_a_write(self, tmp_path):
        log = CsvLog(save_dir=tmp_path, flush_logs_every_n_steps=3)
        log.log_metrics({"b": 1.0, "epoch": 0}, step=0)
        log.log_metrics({"b": torch.tensor(2.0)}, step=1)
        assert not log.path.exists()
        log.log_metrics({"a, quoted": 3.0}, step=2)
        assert log.path.read_text().splitlines() == ['"a, quoted",b,epoch,step', ",1.0,0,0", ",2.0,,1", "3.0,,,2"]
        log.log_metrics({"b": math.nan}, step=3)
        log.save()
        assert log.path.read_text().splitlines()[-1] == ",nan,,3"
        assert [path.name for path in log.path.parent.iterdir()] == ["metrics.csv"]

    def test_rows_are_on_disk_after_a_while(self, tmp_path, monkeypatch):
        log, now = CsvLog(save_dir=tmp_path), time.monotonic()
        log.log_metrics({"a": 1.0}, step=0)
        assert not log.path.exists()
        monkeypatch.setattr(time, "monotonic", lambda: now + 11)
        log.log_metrics({"a": 2.0}, step=1)
        assert len(log.path.read_text().splitlines()) == 3

    def test_going_on_drops_what_lies_past_the_checkpoint_and_a_torn_line(self, tmp_path):
        first = CsvLog(save_dir=tmp_path)
        for step in range(6):
            first.log_metrics({"train/loss": float(step)}, step=step)
            if step == 3:
                first.log_metrics({"val/map": 0.5}, step=3)
        first.save()
        with first.path.open("a") as file:
            file.write("9.0,,9")  # killed in the middle of a line
        second = CsvLog(save_dir=tmp_path)
        second.begin_at(4)
        second.log_metrics({"val/map": 0.5}, step=3)  # the validation after step 3 once more
        second.log_metrics({"train/loss": 40.0, "new": 1.0}, step=4)
        second.save()
        found = read_csv(tmp_path)
        assert [found["train/loss", step] for step in range(5)] == [0, 1, 2, 3, 40]
        assert found["new", 4] == 1 and max(step for _, step in found) == 4
        assert second.path.read_text().count("0.5") == 1

    def test_from_the_start_nothing_is_kept(self, tmp_path):
        first, second = CsvLog(save_dir=tmp_path), CsvLog(save_dir=tmp_path)
        first.log_metrics({"old": 1.0}, step=0)
        first.save()
        second.begin_at(0)
        second.log_metrics({"new": 1.0}, step=0)
        second.close(0)
        assert read_csv(tmp_path) == {("new", 0): 1.0}


class TestTensorBoard:
    def test_a_run(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        figure = run("tensorboard", tmp_path)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert len(events.Scalars("train/loss")) == 12
        assert events.Scalars("val/map")[-1].value == pytest.approx(figure, rel=1e-5)
        assert "hp_metric" not in events.Tags()["scalars"]
        assert b"width: 12" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]

    def test_a_row_is_one_event(self, tmp_path):
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        log = EventLog(save_dir=tmp_path)
        log.log_metrics({f"loss_{place}": place / 10 for place in range(10)}, step=7)
        log.close(0)
        (path,) = (tmp_path / "tensorboard").glob("events.*")
        events = [event for event in EventFileLoader(str(path)).Load() if event.summary.value]
        assert len(events) == 1 and events[0].step == 7 and len(events[0].summary.value) == 10

    def test_going_on_discards_what_lies_past_the_checkpoint(self, tmp_path):
        first = EventLog(save_dir=tmp_path)
        for step in range(6):
            first.log_metrics({"loss": float(step)}, step=step)
        first.close(1)
        time.sleep(1.1)  # files are told apart, and sorted, by the second of their making
        second = EventLog(save_dir=tmp_path)
        second.begin_at(4)
        second.log_metrics({"loss": 40.0}, step=4)
        second.close(0)
        assert read_tensorboard(tmp_path) == {("loss", step): step for step in range(4)} | {("loss", 4): 40.0}


class TestHowRunsEnd:
    def test_the_exit_code_of_an_error(self):
        codes = [
            exit_code(e) for e in (SystemExit(143), SystemExit("text"), SystemExit(), KeyboardInterrupt(), OSError())
        ]
        assert codes == [143, 1, 0, 130, 1]

    @pytest.mark.parametrize(("error", "code"), [(None, 0), (ValueError("no"), 1), (SystemExit(143), 143)])
    def test_every_logger_that_can_hear_it_is_told(self, tmp_path, error, code):
        heard = []

        class Listens(CsvLog):
            def close(self, exit_code):
                heard.append(exit_code)

        class Breaks(CsvLog):
            def close(self, exit_code):
                raise OSError("no space left")

        def work(*loggers):
            with closing([*loggers, Listens(save_dir=tmp_path), object()]):
                if error is not None:
                    raise error

        if error is None:
            work()
        else:
            with pytest.raises(type(error)):
                work()
        assert heard == [code]
        with pytest.raises(OSError if error is None else type(error)):  # how the run ended matters more
            work(Breaks(save_dir=tmp_path))
        assert heard == [code, code]


class TestHandover:
    def test_rows_arrive_in_order_and_together(self):
        blocks = []
        handover = Handover(blocks.append, pause=30)
        for step in range(50):
            handover.put({"a": float(step)}, step)
        start = time.monotonic()
        handover.drain()
        assert time.monotonic() - start < 25  # drain does not sit the pause out
        rows = [row for block in blocks for row in block]
        assert [step for _, step, _ in rows] == list(range(50)) and len(blocks) <= 3
        assert rows[3][0] == {"a": 3.0}

    def test_what_a_tracker_refuses_is_a_warning_and_the_next_row_arrives(self, caplog):
        kept = []

        def write(rows):
            if any(step == 0 for _, step, _ in rows):
                raise ConnectionError("dashboard is away")
            kept.extend(step for _, step, _ in rows)

        handover = Handover(write, pause=0)
        handover.put({"a": 1.0}, 0)
        handover.drain()
        handover.put({"a": 1.0}, 1)
        handover.drain()
        assert kept == [1] and "refused 1 rows of figures: ConnectionError: dashboard is away" in caplog.text

    def test_a_store_that_hangs_does_not_hold_the_run_up(self, caplog):
        release = threading.Event()
        handover = Handover(lambda rows: release.wait(20) and None, pause=0)
        handover.put({}, 0)
        handover.drain(timeout=0.1)
        release.set()
        assert "has not stored its figures" in caplog.text
        handover.drain()
        assert handover._queue.empty()


class TestIdentity:
    def test_a_trial_belongs_to_its_sweep(self, tmp_path):
        single = Identity(tmp_path / "runs/fcos/2026_a", tmp_path / "runs")
        assert (single.name, single.group) == ("fcos/2026_a", None)
        trial = Identity(tmp_path / "runs/fcos/2026_a/seed=1", tmp_path / "runs")
        assert (trial.name, trial.group) == ("seed=1", "fcos/2026_a")
        assert Identity(tmp_path, tmp_path).name.endswith(tmp_path.name)
        elsewhere = Identity(tmp_path / "other/place", tmp_path / "runs")
        assert (elsewhere.name, elsewhere.group) == ("other/place", None)

    def test_ids_are_kept_in_the_directory(self, tmp_path):
        identity = Identity(tmp_path / "run", tmp_path)
        assert identity.read("wandb") is None
        identity.write("wandb", "abc")
        identity.write("mlflow", "def")
        again = Identity(tmp_path / "run", tmp_path)
        assert (again.read("wandb"), again.read("mlflow")) == ("abc", "def")
        assert len(again.derived()) == 16 and again.derived() == identity.derived()
        assert again.derived() != Identity(tmp_path / "run2", tmp_path).derived()


@pytest.mark.slow
class TestWandb:
    def test_two_runs_offline(self, tmp_path, monkeypatch):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        import wandb

        run("wandb", tmp_path / "one" / "a")
        run("wandb", tmp_path / "one" / "a" / "second")  # as the next trial of a sweep: a run of its own
        wandb.finish()
        assert len(list((tmp_path / "one/a/second/wandb").glob("offline-run-*/run-*.wandb"))) == 1
        (folder,) = (tmp_path / "one/a/wandb").glob("offline-run-*")
        content = (folder / next(folder.glob("run-*.wandb")).name).read_bytes()
        assert b"val/map" in content and b"width" in content

    def test_a_continued_run_keeps_its_id_and_tells_its_exit_code(self, tmp_path):
        ids, codes = [], []
        for code in (143, 0):
            logger = wandb_logger(save_dir=tmp_path / "run", root=tmp_path, offline=True)
            logger.log_metrics({"a": 1.0}, step=code)
            logger.close(code)
            ids.append(logger.version)
        for folder in sorted((tmp_path / "run/wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime):
            (end,) = [r for r in wandb_records(folder) if r.WhichOneof("record_type") == "exit"]
            codes.append(end.exit.exit_code)
        assert ids[0] == ids[1] == Identity(tmp_path / "run", tmp_path).read("wandb")
        assert codes == [143, 0] or len(codes) == 1  # in one second both lie in one folder

    def test_login_is_looked_for_in_the_settings_alone(self, monkeypatch, tmp_path):
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


@pytest.mark.slow
class TestMlflow:
    def test_a_run_and_its_continuation(self, tmp_path):
        pytest.importorskip("mlflow", reason="an extra: pip install detseg[mlflow]")
        figure = run("mlflow", tmp_path / "run")
        settings = {"root": tmp_path, "experiment_name": "orchard-fcos"}
        second = MlflowLog(save_dir=tmp_path / "run", **settings)
        second.log_hyperparams({"model": {"width": 13}, "added": 1})
        second.log_metrics({"val/map": 2.0, "odd (name)": 1.0}, step=99)
        second.close(143)
        with sqlite3.connect(tmp_path / "mlflow.db") as store:
            values = store.execute("select value from metrics where key = 'val/map' order by step").fetchall()
            params = dict(store.execute("select key, value from params").fetchall())
            tags = dict(store.execute("select key, value from tags").fetchall())
            runs = store.execute("select status, run_uuid, name from runs").fetchall()
            experiments = store.execute("select name from experiments").fetchall()
        assert [value for (value,) in values[:-1]][-1] == pytest.approx(figure, rel=1e-5) and values[-1] == (2.0,)
        assert len(runs) == 1 and runs[0][::2] == ("KILLED", "run")
        assert params["model/width"] == "12" and params["added"] == "1" and tags["changed/model/width"] == "13"
        assert ("orchard-fcos",) in experiments and second.run_id == runs[0][1]

    def test_names(self):
        assert metric_name("val/map/red (big)") == "val/map/red _big_"
        assert metric_name("val/map/Äpfel") == "val/map/Äpfel"


def test_many_and_none(tmp_path):
    kinds = [type(logger).__name__ for logger in loggers("many", tmp_path)]
    assert kinds == ["CsvLog", "EventLog", "WandbLog"]
    assert loggers("none", tmp_path) == []
