from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from detseg.callbacks import EMA, CheckpointStamp
from detseg.stamp import git_commit, make_stamp, plain, versions
from tiny_task import TinyTask, fit

CONFIG = {
    "truth": "boxes",
    "model": {"_target_": "torch.nn.Linear", "in_features": 3, "num_classes": None},
    "data": {"size_divisor": 32, "eval_transform": {"_target_": "detseg.data.DetectionEval", "size": [96, 96]}},
    "trainer": {"max_epochs": 2, "precision": None},
    "path": Path("runs/a"),
}


def checkpoint_of(tmp_path: Path, task: TinyTask, *callbacks) -> dict:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/map", mode="max", save_last=True)
    fit(task, tmp_path, saver, *callbacks)
    return torch.load(tmp_path / "last.ckpt", weights_only=True)  # refuses anything but plain values and tensors


@pytest.mark.parametrize("average", [False, True])
def test_a_trained_checkpoint_is_plain_and_says_what_it_is(tmp_path, average):
    callbacks = [CheckpointStamp(config=CONFIG)] + [EMA()] * average
    stamp = checkpoint_of(tmp_path, TinyTask(num_classes=3), *callbacks)["detseg"]
    assert stamp["format"] == 1
    assert stamp["config"] == {**CONFIG, "path": "runs/a"}
    assert stamp["model"] == {"_target_": "torch.nn.Linear", "in_features": 3, "num_classes": 3}
    assert stamp["class_names"] == ["class0", "class1", "class2"]
    assert stamp["category_ids"] == [0, 1, 2]
    assert stamp["eval_transform"]["size"] == [96, 96]
    assert (stamp["size_divisor"], stamp["truth"]) == (32, "boxes")
    assert stamp["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_config_may_come_from_the_task(tmp_path):
    task = TinyTask()
    task.config = CONFIG
    assert checkpoint_of(tmp_path, task, CheckpointStamp())["detseg"]["truth"] == "boxes"


def test_a_model_built_by_hand_is_stamped_without_config(tmp_path):
    stamp = checkpoint_of(tmp_path, TinyTask(), CheckpointStamp())["detseg"]
    assert stamp["config"] is None and stamp["model"] is None
    assert stamp["class_names"] == ["class0", "class1"]


def test_category_ids_of_the_data_set_are_kept():
    stamp = make_stamp(None, class_names=("cat", "dog"), category_ids=[17, 18])
    assert stamp["category_ids"] == [17, 18]
    assert make_stamp(None, class_names=None)["category_ids"] is None


def test_what_is_not_plain_is_named():
    assert plain((1, 2.5, None, {"a": Path("b")}), "config") == [1, 2.5, None, {"a": "b"}]
    with pytest.raises(TypeError, match=r"config\.model\.act\[0\] is a ReLU"):
        plain({"model": {"act": [torch.nn.ReLU()]}}, "config")
    with pytest.raises(TypeError, match=r"config is a DictConfig.*to_container|config\..*"):
        plain({"x": object()}, "config")
    node = OmegaConf.create({"a": [1, 2]})
    assert plain(OmegaConf.to_container(node), "config") == {"a": [1, 2]}


def test_versions_and_commit(tmp_path):
    found = versions()
    assert {"python", "torch", "lightning", "detseg"} <= set(found)
    assert git_commit(tmp_path) is None  # no work tree
    import subprocess

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    assert git_commit(tmp_path) is None  # nothing is tracked
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{git('rev-parse', 'HEAD')}-dirty"
