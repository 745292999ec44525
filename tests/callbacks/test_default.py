"""conf/callbacks as users combine it."""

from __future__ import annotations

import pytest

import detseg


def keys(*overrides: str) -> dict:
    return dict(detseg.load_config("model=unet_small", *overrides).callbacks)


def test_what_every_run_has():
    found = keys()
    expected = {"checkpoint", "guard", "stamp", "shutdown", "speed", "progress", "images", "curves"}
    assert expected == set(found)
    assert found["checkpoint"].monitor == "val/miou" and found["checkpoint"].mode == "max"


@pytest.mark.parametrize(
    ("choice", "added"),
    [
        ("[default,ema]", {"ema"}),
        ("[default,early_stopping]", {"early_stopping"}),
        ("[default,ema,early_stopping]", {"ema", "early_stopping"}),
    ],
)
def test_more_are_added_by_name(choice, added):
    found = keys(f"callbacks={choice}")
    assert set(found) == set(keys()) | added


def test_null_removes_one_and_none_removes_all(in_tmp):
    assert keys("callbacks.images=null")["images"] is None
    small = ["model=unet_small", "data.train_images=4", "data.val_images=2", "data.num_workers=0", "logger=none"]
    run = detseg.build(detseg.load_config(*small, "callbacks.images=null", "trainer.accelerator=cpu"))
    kinds = {type(callback).__name__ for callback in run.trainer.callbacks}
    assert "ImageLogger" not in kinds and "CheckpointStamp" in kinds and "SpeedMonitor" in kinds
    assert keys("callbacks=none") == {}
    bare = detseg.build(detseg.load_config(*small, "callbacks=none", "trainer.accelerator=cpu"))
    assert "CheckpointStamp" not in {type(callback).__name__ for callback in bare.trainer.callbacks}


def test_early_stopping_follows_the_task():
    found = keys("callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=2")["early_stopping"]
    assert (found.monitor, found.mode, found.patience) == ("val/miou", "max", 2)
