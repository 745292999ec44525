"""Training of a present-day YOLO n beside Ultralytics' own trainer, on the same files.

Orchard is drawn once into a folder of PNG images and YOLO text files, which both read. Both train from random weights
with AdamW, the same batch size, a moving average of the weights, the same number of threads and no worker processes,
keep checkpoints, and validate after every epoch; neither draws pictures. Mosaic is on in both or off in both; what
else each does to an image by default (flips and colours; Ultralytics shifts and scales) stays. The time counts from
the end of the first epoch on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from side_by_side import peer
from torchvision.io import write_png

import detseg
from detseg.engine.errors import quiet

PIXELS = 320
TRAIN, VAL = 160, 40
BATCH = 16
CHOICES = ((), ("task.channels_last=true",), ("task.channels_last=true", "data.cache_images=false"))
"""Overrides of ours that are measured. Ultralytics' mosaic takes the other images from a buffer of 8 batches, decoded;
ours takes any, from memory where the split is small enough to be kept, else it decodes each."""


class Clock(L.Callback):
    """The moment at which each epoch ended, its validation included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the clock."""
        self.ends.append(time.perf_counter())


def write_orchard(folder: Path) -> None:
    """Draw both splits into ``folder`` as YOLO has them: data.yaml, images/ and labels/."""
    quiet()
    sizes = [f"data.image_size={PIXELS}", f"data.train_images={TRAIN}", f"data.val_images={VAL}"]
    data = detseg.build(detseg.load_config("data=orchard", "paths=notebook", *sizes)).data
    for split in ("train", "val"):
        images, labels = (folder / kind / split for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        samples = data.dataset(split)
        for index in range(len(samples)):
            sample = samples[index]
            write_png(torch.as_tensor(sample.image), str(images / f"{index:04}.png"), compression_level=1)
            (labels / f"{index:04}.txt").write_text("\n".join(_lines(sample.target)))
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": list(data.class_names)}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))


def _lines(target: Any) -> list[str]:
    """Return ``class x y width height`` of each object, as shares of the image."""
    boxes = target.boxes / PIXELS  # (G, 4)
    middle, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]  # (G, 2) each
    rows = torch.cat([middle, side], dim=1).tolist()
    return [f"{label} " + " ".join(f"{v:.6f}" for v in row) for label, row in zip(target.labels, rows, strict=True)]


def ours(data: Path, folder: Path, epochs: int, mosaic: bool, *overrides: str) -> list[float]:
    """Train ours on the files, with further overrides; return when each epoch ended."""
    recipe = ["augment=yolo", "data.train_transform.augment.mixup=0", "data.train_transform.augment.multi_scale=null"]
    recipe += ["data.train_transform.augment.close_epochs=0"]
    cfg = detseg.load_config(
        *["model=yolo", "data=yolo", "optimizer=adamw", "paths=notebook", "trainer=cpu", "logger=csv"],
        "features=[ema]",
        *(recipe if mosaic else []),
        f"data.root={data}",
        f"data.batch_size={BATCH}",
        f"data.eval_batch_size={2 * BATCH}",  # as Ultralytics does
        "data.num_workers=0",
        f"trainer.max_epochs={epochs}",
        "callbacks.images=null",
        "callbacks.curves=null",
        "callbacks.progress=null",
        f"paths.output_dir={folder}",
        *overrides,
    )
    run = detseg.build(cfg)
    clock = Clock()
    run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]  # Lightning's list
    run.trainer.fit(run.task, datamodule=run.data)
    return clock.ends


def theirs(data: Path, folder: Path, epochs: int, mosaic: bool, python: Path) -> tuple[list[float], str]:
    """Train Ultralytics' on the files; return when each epoch ended, and its version."""
    settings = {
        "model": "yolo11n.yaml",
        "data": str(data / "data.yaml"),
        "epochs": epochs,
        "imgsz": PIXELS,
        "batch": BATCH,
        "nbs": BATCH,  # an optimiser step for every batch
        "workers": 0,
        "device": "cpu",
        "optimizer": "AdamW",
        "amp": False,
        "plots": False,
        "val": True,
        "mosaic": 1.0 if mosaic else 0.0,
        "close_mosaic": 0,
        "pretrained": False,
        "verbose": False,
        "project": str(folder),
        "threads": torch.get_num_threads(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(settings))
    peer.call(python, "train", folder)
    answer = json.loads((folder / "trained.json").read_text())
    return answer["ends"], str(answer["version"])


def rate(ends: Sequence[float]) -> float:
    """Return training images per second from the end of the first epoch to that of the last."""
    return TRAIN * (len(ends) - 1) / (ends[-1] - ends[0])
