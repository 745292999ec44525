"""A sweep with every tracker at once: the same figures in each, one run per trial, and how each trial ended."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from detseg.cli.main import main
from tracker_files import read_csv, read_mlflow, read_pictures, read_tensorboard, read_wandb, wandb_records

TINY = [
    "trainer=cpu",
    "data.train_images=8",
    "data.val_images=3",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "callbacks.images.images=2",
    "evaluate_after=false",
]
LOGGERS = ["logger=[csv,tensorboard,wandb,mlflow]", "logger.wandb.system_interval=0.5"]
RATES = ("0.001", "1.0e+30", "0.002")  # the second one's loss is not finite: that trial fails
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sweep three trials offline; return the directory in which `runs` lies."""
    pytest.importorskip("mlflow", reason="an extra: pip install detseg[mlflow]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sweep"))
        patch.setenv("WANDB_MODE", "offline")
        main(["train", "-m", *TINY, *LOGGERS, "model=fcos_small", "name=swept", f"optimizer.lr={','.join(RATES)}"])
        return Path.cwd()


def trial(directory: Path, rate: str) -> Path:
    (found,) = [
        path.parent
        for path in directory.glob("runs/swept/*/*/resolved.yaml")
        if float(path.parent.name.partition("lr=")[2]) == float(rate)
    ]
    return found


def offline_run(run: Path) -> list[Any]:
    (folder,) = (run / "wandb").glob("offline-run-*")
    return wandb_records(folder)


def one(records: list[Any], kind: str) -> Any:
    (found,) = [record for record in records if record.WhichOneof("record_type") == kind]
    return getattr(found, kind)


def test_the_same_names_and_values_in_each(swept: Path):
    run = trial(swept, RATES[0])
    table = read_csv(run)
    run_id = json.loads((run / "trackers.json").read_text())["mlflow"]
    others = {
        "tensorboard": read_tensorboard(run),
        "mlflow": read_mlflow(swept / "runs" / "mlflow.db", run_id),
        "wandb": read_wandb(offline_run(run)),
    }
    assert {("train/loss", 0), ("train/loss", 7), ("val/map", 3), ("val/map", 7), ("lr-AdamW/rest", 0)} <= set(table)
    for tracker, found in others.items():
        assert set(found) == set(table), tracker
        different = {
            key: (value, found[key])
            for key, value in table.items()
            if not math.isclose(value, found[key], rel_tol=1e-6, abs_tol=1e-9)
        }
        assert different == {}, tracker


def test_one_wandb_run_per_trial_with_its_exit_code(swept: Path):
    codes, ids, groups = [], set(), set()
    for rate in RATES:
        records = offline_run(trial(swept, rate))
        run = one(records, "run")
        codes.append(one(records, "exit").exit_code)
        ids.add(run.run_id)
        groups.add(run.run_group)
        assert float(run.display_name.partition("lr=")[2]) == float(rate)
    assert codes == [0, 1, 0]
    assert len(ids) == 3
    assert groups == {f"swept/{trial(swept, RATES[0]).parent.name}"}


def test_wandb_has_config_pictures_curves_and_system_figures(swept: Path):
    run = trial(swept, RATES[0])
    records = offline_run(run)
    kinds = {record.WhichOneof("record_type") for record in records}
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    names = {(item.nested_key or [item.key])[0] for row in rows for item in row.item}
    assert {"val/pictures", "val/pr_box", "val/confusion"} <= names
    config = {u.key or "/".join(u.nested_key) for r in records for u in r.config.update}
    config |= {u.key for u in one(records, "run").config.update}
    assert {"model", "optimizer", "seed"} <= config
    system = {item.key for r in records if r.WhichOneof("record_type") == "stats" for item in r.stats.item}
    assert any("cpu" in name for name in system) and any("memory" in name for name in system), system
    assert "exit" in kinds and list((run / "wandb").glob("offline-run-*/files/media/metadata/boxes2D/**/*.json"))


def test_mlflow_compares_the_trials_in_one_store(swept: Path):
    with sqlite3.connect(swept / "runs" / "mlflow.db") as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        sweeps = store.execute("select distinct value from tags where key = 'sweep'").fetchall()
        rates = store.execute("select value from params where key = 'optimizer/lr'").fetchall()
    assert sorted(status for _, status in runs) == ["FAILED", "FINISHED", "FINISHED"]
    assert len(sweeps) == 1 and sorted(float(rate) for (rate,) in rates) == sorted(map(float, RATES))
    pictures = {path.name for path in (swept / "runs" / "mlflow_artifacts").rglob("*.png")}
    assert {"val_epoch_001.png", "val_epoch_001_pr_box.png", "val_epoch_001_confusion.png"} <= pictures


def test_pictures_lie_in_the_run(swept: Path):
    import cv2

    pictures = trial(swept, RATES[2]) / "pictures"
    for name in ("pr_box", "confusion"):
        image = cv2.imread(str(pictures / f"val_epoch_001_{name}.png"))
        assert image is not None and min(image.shape[:2]) > 300 and image.std() > 10
    assert not (pictures / "val_epoch_000_confusion.png").exists()


def test_a_run_that_goes_on_keeps_ids_and_has_every_row_once(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the checkpoint of its first epoch, in its own directory: every tracker has what it had without a break."""
    shutil.copytree(swept / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trial(tmp_path, RATES[0])
    whole, ids, store = read_csv(run), json.loads((run / "trackers.json").read_text()), tmp_path / "runs" / "mlflow.db"
    events, pictures = read_tensorboard(run), read_pictures(run)
    assert pictures == {("val/pictures", 3), ("val/pictures", 7), ("val/pr_box", 7), ("val/confusion", 7)}
    for path in [run / "metrics.json", *(run / "checkpoints").glob("*.ckpt")]:
        if path.name != "last-1.ckpt":
            path.unlink()
    before = offline_run(run)
    assert main(["train", f"resume={run}"]) == 0
    assert json.loads((run / "trackers.json").read_text()) == ids
    assert read_pictures(run) == pictures, "that of the epoch which ended with the checkpoint is gone"
    (again,) = [path for path in (run / "wandb").glob("offline-run-*") if wandb_records(path) != before]
    records = wandb_records(again)
    assert one(records, "run").run_id == one(before, "run").run_id == ids["wandb"]
    assert one(records, "exit").exit_code == 0
    for tracker, found, expected in (
        ("csv", read_csv(run), whole),
        ("tensorboard", read_tensorboard(run), events),
        ("mlflow", read_mlflow(store, ids["mlflow"]), whole),
        ("wandb", read_wandb(records), {key: value for key, value in whole.items() if key[1] >= 4}),
    ):
        assert set(found) == set(expected), tracker
        same = {key: value for key, value in expected.items() if not key[0].startswith("speed/")}
        assert {key: found[key] for key in same} == pytest.approx(same, rel=1e-6), tracker
    rows = [line.split(",") for line in (run / "csv" / "metrics.csv").read_text().splitlines()]
    assert len(rows) == len({tuple(row) for row in rows}) and all(len(row) == len(rows[0]) for row in rows)
    with sqlite3.connect(store) as opened:
        assert opened.execute("select status from runs where run_uuid = ?", [ids["mlflow"]]).fetchone() == ("FINISHED",)
        assert opened.execute("select count(*) from runs").fetchone() == (3,)
