"""A run of several processes, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import detseg

SMALL = ["data.image_size=64", "data.train_images=8", "data.val_images=5", "data.batch_size=2", "data.num_workers=0"]
SHORT = ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "callbacks.images=null", "name=two"]


def test_two_processes_train_one_model_in_one_directory(tmp_path: Path):
    """Five validation images on two ranks: three and two."""
    devices = ["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    command = [str(Path(sys.executable).with_name("detseg")), "train", "model=fcos_small", *devices, *SMALL, *SHORT]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=threads, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1, "both processes print"
    (run,) = tmp_path.glob("runs/*/*")
    steps = [line for line in (run / "csv" / "metrics.csv").read_text().splitlines()[1:] if line]
    assert len(steps) >= 2
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["count"] > 0 and figures["loss"] > 0
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2  # eight images, two of them on each of two ranks
    assert detseg.load(run / "checkpoints" / "best.ckpt").class_names == ["apple", "pear", "orange"]
