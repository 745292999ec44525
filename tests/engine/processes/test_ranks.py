"""Figures do not depend on the number of processes, however unevenly the images are divided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from detseg.config import build, load_config
from ranks import run_ranks

MODELS = ["fcos_small", "retinanet_small", "faster_rcnn_small", "mask_rcnn_small", "unet_small"]
IMAGES = 5  # on two ranks three and two, on three ranks two, two and one


def overrides(name: str, images: int, world: int, folder: str) -> list[str]:
    data = [f"data.val_images={images}", "data.train_images=4", "data.image_size=64", "data.num_workers=0"]
    # One image at a time: a loss is a mean over what is in the batch, and the batches differ with the ranks.
    trainer = ["trainer=ddp_cpu" if world > 1 else "trainer=cpu", f"trainer.devices={world}", "data.eval_batch_size=1"]
    quiet = ["callbacks=none", "logger=none", "trainer.enable_checkpointing=false", f"paths.root={folder}"]
    return [f"model={name}", *data, *trainer, *quiet]


def validate(rank: int, folder: str, names: list[str], images: int, world: int) -> dict[str, dict[str, float]]:
    """Return every figure of an untrained model per name."""
    found = {}
    for name in names:
        run = build(load_config(*overrides(name, images, world, folder)))
        if hasattr(run.task.model, "score_threshold"):
            run.task.model.score_threshold = 0.0  # so that an untrained model finds something to be counted
        run.trainer.validate(run.task, datamodule=run.data, verbose=False)
        found[name] = dict(run.task.results["val"])
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(validate, 1, folder, str(folder), MODELS, IMAGES, 1)[0]


def assert_same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = ours[name] == pytest.approx(value, rel=1e-5, abs=1e-7) or (math.isnan(ours[name]) and math.isnan(value))
        assert same, f"{name}: {ours[name]} and {value}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_validation_figures_are_those_of_one_process(world: int, alone: dict[str, Any], tmp_path: Path):
    ranks = run_ranks(validate, world, tmp_path, str(tmp_path), MODELS, IMAGES, world)
    assert len(ranks) == world
    for found in ranks:  # every rank knows all figures: they decide together when to stop
        for name in MODELS:
            assert_same(found[name], alone[name])
    assert alone["fcos_small"]["count"] > 5
    assert alone["unet_small"]["miou"] > 0


@pytest.mark.slow
def test_a_rank_without_images_is_waited_for_by_nobody(tmp_path: Path):
    """Two images on three ranks."""
    names = ["fcos_small", "unet_small"]
    alone = run_ranks(validate, 1, tmp_path / "1", str(tmp_path), names, 2, 1)[0]
    ranks = run_ranks(validate, 3, tmp_path / "3", str(tmp_path), names, 2, 3)
    for found in ranks:
        for name in names:
            assert_same(found[name], alone[name])
    assert torch.tensor(alone["fcos_small"]["loss"]).isfinite()
    assert alone["fcos_small"]["loss"] > 0
