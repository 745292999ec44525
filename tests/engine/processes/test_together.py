"""Whole small runs on two forked ranks, against one process and against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import detseg
from detseg.config import load_config
from detseg.experiment import train_here
from ranks import run_ranks

SMALL = ["data.image_size=64", "data.train_images=8", "data.val_images=5", "data.num_workers=0", "evaluate_after=true"]
PLAIN = ["callbacks.images=null", "callbacks.curves=null", "callbacks.speed=null", "logger=none", "scheduler=constant"]


def train(rank: int, directory: str, overrides: list[str]) -> dict[str, Any]:
    """Train in this process and return figures, steps and weights of the last checkpoint."""
    cfg = load_config("model=fcos_small", *SMALL, *PLAIN, f"paths.output_dir={directory}", *overrides)
    outcome = train_here(cfg)
    return {"figures": outcome.figures, "checkpoint": str(outcome.checkpoint)}


def last(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}


@pytest.mark.slow
def test_sharded_training_is_that_of_ddp(tmp_path: Path):
    """Two epochs of two steps; then a run of two other processes goes on from the file."""
    shape = ["trainer.devices=2", "data.batch_size=2", "trainer.max_epochs=2", "lr_rule=none", "optimizer=sgd"]
    sharded = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    plain = run_ranks(train, 2, tmp_path / "a", str(tmp_path / "ddp"), ["trainer=ddp_cpu", *shape])
    found = run_ranks(train, 2, tmp_path / "b", str(tmp_path / "fsdp"), [*sharded, *shape])
    ours, theirs = last(tmp_path / "fsdp"), last(tmp_path / "ddp")
    assert ours["global_step"] == theirs["global_step"] == 4
    assert weights(ours).keys() == weights(theirs).keys()
    for name, value in weights(ours).items():
        assert_close(value, weights(theirs)[name], rtol=1e-4, atol=1e-5, msg=name)
    assert found[0]["figures"]["loss"] == pytest.approx(plain[0]["figures"]["loss"], rel=1e-4)
    assert found[0]["figures"] == pytest.approx(found[1]["figures"], nan_ok=True)
    model = detseg.load(tmp_path / "fsdp" / "checkpoints" / "best.ckpt")
    assert model.class_names == ["apple", "pear", "orange"]
    more = [f"resume={tmp_path / 'fsdp' / 'checkpoints' / 'last.ckpt'}", *shape, "trainer.max_epochs=3"]
    run_ranks(train, 2, tmp_path / "c", str(tmp_path / "more"), [*sharded, *more])
    run_ranks(train, 2, tmp_path / "d", str(tmp_path / "same"), ["trainer=ddp_cpu", *shape, "trainer.max_epochs=3"])
    ours, theirs = last(tmp_path / "more"), last(tmp_path / "same")
    assert ours["global_step"] == 6
    for name, value in weights(ours).items():
        assert_close(value, weights(theirs)[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_averaged_weights_of_two_processes_are_those_of_one(tmp_path: Path):
    """Batch norm counts per process, so the comparison is of a model without: the same gradient, the same average."""
    norms = ["model.backbone.norm=null", "callbacks=[default,ema]", "lr_rule=none", "trainer.max_epochs=2"]
    norms += ["data.train_transform=null", "optimizer=sgd", "model.backbone.backbone._target_=frozen_norms.FrozenTiny"]
    one = ["trainer=cpu", "data.batch_size=4", *norms, "allow=[frozen_norms]"]
    two = ["trainer=ddp_cpu", "data.batch_size=2", *norms, "allow=[frozen_norms]"]
    run_ranks(train, 1, tmp_path / "a", str(tmp_path / "one"), one)
    run_ranks(train, 2, tmp_path / "b", str(tmp_path / "two"), two)
    ours, theirs = last(tmp_path / "two"), last(tmp_path / "one")
    assert ours["global_step"] == theirs["global_step"] == 4
    compared = 0
    for name, value in weights(theirs).items():
        if value.is_floating_point():
            compared += 1
            assert_close(weights(ours)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert compared > 20
    assert any(not torch.equal(value, theirs["current_model_state"][name]) for name, value in weights(theirs).items())
