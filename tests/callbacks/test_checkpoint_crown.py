"""A checkpoint that a stage after training made takes the place of the last and the best; see ``engine.stages``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from detseg.callbacks import Checkpoint, DurableIO
from detseg.checkpoint import read_checkpoint
from detseg.durable import check_seal
from tiny_task import TinyTask


class Scripted(TinyTask):
    """Its validation figures are given, one per epoch."""

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.figures = figures

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/map", self.figures[self.current_epoch])


def run(directory: Path, figures: list[float], resume: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=len(figures),
        callbacks=[Checkpoint(dirpath=directory, monitor="val/map", **options)],
        plugins=[DurableIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory.parent,
    )
    trainer.fit(Scripted(figures), ckpt_path=resume, weights_only=True)
    return trainer


def crown(trainer: L.Trainer, source: Path) -> Checkpoint:
    callback = trainer.checkpoint_callback
    assert isinstance(callback, Checkpoint)
    callback.crown(trainer, {**read_checkpoint(source), "mark": "fitted"})
    return callback


def test_it_is_last_and_best_whatever_the_figures_said(tmp_path: Path) -> None:
    trainer = run(tmp_path / "c", [3.0, 1.0])
    callback = crown(trainer, tmp_path / "c" / "last.ckpt")
    last, best, before = (tmp_path / "c" / f"{name}.ckpt" for name in ("last", "best", "last-1"))
    assert last.samefile(best) and check_seal(best) is not None
    assert read_checkpoint(best)["mark"] == "fitted" and "mark" not in read_checkpoint(before)
    assert callback.best_model_path == str(best) and math.isnan(float(callback.best_model_score))  # type: ignore[arg-type]
    assert read_checkpoint(best)["global_step"] == trainer.global_step


def test_training_that_goes_on_finds_a_better_one(tmp_path: Path) -> None:
    crown(run(tmp_path / "c", [3.0, 1.0]), tmp_path / "c" / "last.ckpt")
    trainer = run(tmp_path / "c", [3.0, 1.0, 0.5], resume=tmp_path / "c" / "last.ckpt")
    assert float(trainer.checkpoint_callback.best_model_score) == 0.5  # type: ignore[union-attr,arg-type]
    assert "mark" not in read_checkpoint(tmp_path / "c" / "best.ckpt")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"save_top_k": 0}, {"last"}),
        ({"save_last": False}, {"best"}),
        ({"save_top_k": 2}, {"last", "best"}),
    ],
)
def test_only_what_is_kept_at_all_is_written(options: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    trainer = run(tmp_path / "c", [3.0, 1.0], **options)
    source = next(iter(sorted((tmp_path / "c").glob("*.ckpt"), reverse=True)))
    callback = crown(trainer, source)
    marked = {path.stem for path in (tmp_path / "c").glob("*.ckpt") if "mark" in read_checkpoint(path)}
    assert marked == names
    assert Path(callback.best_model_path).stem == ("best" if "best" in names else "")
