"""A run in which everything draws random numbers, and what it left behind step by step, for tests of resuming."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from detseg.callbacks import EMA, Checkpoint, DurableIO
from detseg.data import DetectionData
from detseg.data.sample import Sample, SampleDataset
from detseg.structures import Target
from detseg.tasks import Detection
from detseg.tasks.schedules import WarmupCosine
from fake_models import FakeDetector, FakeOutputs


class Numbered(SampleDataset):
    """Grey images of 16 x 16 whose image id is their number."""

    class_names, category_ids = ("apple", "pear"), (1, 2)

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        target = Target(boxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]), labels=torch.zeros(1, dtype=torch.int64),
                        image_id=index, size=(16, 16))  # fmt: skip
        return Sample(torch.full((3, 16, 16), 10 * index % 256, dtype=torch.uint8), target)


class NumberedData(DetectionData):
    """``train`` images in batches of 2, with augmentation that draws from torch, numpy and Python."""

    splits = ("train", "val")

    def __init__(self, *, train: int = 10, val: int = 5, **options: Any) -> None:
        options = {"batch_size": 2, "num_workers": 0, "seed": 3, "train_transform": noise} | options
        super().__init__(size_divisor=16, **options)
        self.counts = {"train": train, "val": val}

    def read(self, split: str) -> Numbered:
        return Numbered(self.counts[split])


def noise(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    extra = torch.randint(0, 99, (3, 16, 16)) + np.random.randint(50) + random.randrange(50)
    return (image.long() + extra).clamp(max=255).to(torch.uint8), target


class Dropping(FakeDetector):
    """Batch norm, dropout, and losses that draw from torch, numpy and Python."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.4)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Any = None) -> FakeOutputs:
        features = self.backbone["fpn"](self.backbone["body"](images)).mean(dim=(2, 3))
        features = self.dropout(self.batch_norm(features))
        return FakeOutputs(self.head(features), self.norm(features))

    def loss(self, outputs: FakeOutputs, targets: Any) -> dict[str, Tensor]:
        factor = 1.0 if not self.training else 1 + random.random() + np.random.rand() + float(torch.rand(()))
        return {"loss_box": (outputs.features.square().mean() + (outputs.scores - 1).square().mean()) * factor}


class Trace(L.Callback):
    """What happened: ("step", number, ids, loss, rate) and ("val", step, loss), ("epoch", number, figure) in order.

    Args:
        file: where each line is written at once, so that a killed run leaves it.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.lines: list[str] = []
        self.file = file

    def say(self, *what: object) -> None:
        line = " ".join(value.hex() if isinstance(value, float) else str(value) for value in what)
        self.lines.append(line)
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(line + "\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        ids = ",".join(str(target.image_id) for target in batch.targets)
        self.say("step", trainer.global_step, batch_idx, ids, float(outputs["loss"]), rate, checksum(pl_module))

    def on_validation_end(self, trainer, pl_module):
        value = float(trainer.callback_metrics["val/loss"])
        self.say("val", trainer.global_step, value, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer, pl_module):
        self.say("epoch", trainer.current_epoch, float(trainer.callback_metrics.get("val/loss", -1)))


def checksum(module: nn.Module) -> float:
    return float(sum(value.detach().double().abs().sum() for value in module.parameters()))


def task() -> Detection:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return Detection(
        model=Dropping(),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        scheduler=partial(WarmupCosine, warmup_steps=3),
        class_names=["apple", "pear"],
        monitor="val/loss",
        mode="min",
    )


def callbacks(directory: Path, trace: Trace, **checkpoint: Any) -> list[L.Callback]:
    keeper = Checkpoint(**{"dirpath": directory / "checkpoints", "monitor": "val/loss", "mode": "min"} | checkpoint)
    stopping = EarlyStopping(monitor="val/loss", patience=50, strict=False)
    return [EMA(decay=0.8), trace, stopping, keeper]


def fit(
    directory: Path, *extra: L.Callback, resume: Path | None = None, trace: Trace | None = None,
    data: dict[str, Any] | None = None, checkpoint: dict[str, Any] | None = None, **trainer: Any,
) -> tuple[list[str], Detection, L.Trainer]:  # fmt: skip
    """Train three epochs of five batches; return what happened, the task and the trainer."""
    trace = trace or Trace()
    built = L.Trainer(
        accelerator="cpu", default_root_dir=directory, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, logger=False, callbacks=[*callbacks(directory, trace, **checkpoint or {}), *extra],
        use_distributed_sampler=False, plugins=[DurableIO()], **{"max_epochs": 3} | trainer,
    )  # fmt: skip
    module = task()
    built.fit(module, datamodule=NumberedData(**data or {}), ckpt_path=resume, weights_only=True)
    return trace.lines, module, built
