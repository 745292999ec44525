"""Detectors that go wrong on certain images, and a run of them that ends as a test wants it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from detseg.callbacks import CheckpointStamp, Guard
from detseg.structures import Batch, Target
from detseg.tasks import Detection
from fake_models import FakeOutputs, batch, boxes

NAMES = ["apple", "pear"]
DARK, BRIGHT, GREY = 0.0, 1.0, 0.5
"""Pixels of an image whose loss is not finite, of one whose gradient is not, and of one that is well."""


class Log(nn.Module):
    """The logarithm, which is -inf at 0; minus itself the output is NaN there."""

    def forward(self, values: Tensor) -> Tensor:
        logs = values.log()
        return logs - logs.detach() + 1


class Moody(nn.Module):
    """Its loss is NaN where an image is all dark; where one is all bright, the loss is finite and its gradient is not.

    It has what a step changes beside its weights: batch norm's statistics and, where wanted, dropout's random numbers.
    """

    def __init__(self, *, num_classes: int = 2, dropout: float = 0.0, silent: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3)})
        self.norm, self.log, self.dropout = nn.BatchNorm2d(4), Log(), nn.Dropout(dropout)
        self.head = nn.Linear(4, num_classes)
        if silent:
            self.idle = nn.Linear(2, 3)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Any = None) -> FakeOutputs:
        light = images.mean(dim=(1, 2, 3))  # (B,)
        features = self.norm(self.backbone["body"](images * self.log(light)[:, None, None, None])).mean(dim=(2, 3))
        dim = torch.where(light == BRIGHT, 0 * features[:, 0], features[:, 0].square() + 1)  # (B,)
        return FakeOutputs(self.head(self.dropout(features)), dim.sqrt())  # sqrt at 0: its gradient is 0 * inf

    def loss(self, outputs: FakeOutputs, targets: list[Target]) -> dict[str, Tensor]:
        return {
            "loss_classification": (outputs.scores - 1).square().mean(),
            "loss_box": outputs.features.mean(),
        }

    def predict(self, outputs: FakeOutputs, sizes: Tensor) -> list[Any]:
        raise NotImplementedError


class MoodyRegions(Moody):
    """Is given proposals; a term of its loss is their mean."""

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        targets: Any = None,
        proposals: list[Tensor] | None = None,
    ) -> FakeOutputs:
        assert proposals is not None
        self.regions = torch.cat(proposals).mean()
        return super().forward(images, sizes, targets)

    def loss(self, outputs: FakeOutputs, targets: list[Target]) -> dict[str, Tensor]:
        return {**super().loss(outputs, targets), "loss_regions": self.regions}


def images(number: int, light: float = GREY, *, varied: bool = True) -> Batch:
    """Return a batch of two images, ids 10 * number and one more; the second has the light asked for."""
    targets = [
        Target(boxes=boxes((1, 1, 5, 5)), labels=torch.zeros(1, dtype=torch.int64), image_id=10 * number + one)
        for one in range(2)
    ]
    made = batch(targets, side=8)
    generator = torch.Generator().manual_seed(number)
    made.images = torch.rand(made.images.shape, generator=generator) * 0.5 + 0.2  # (2, 3, 8, 8)
    if light != GREY:
        made.images[1] = light
    return made


def make_task(optimizer: Any = None, kind: type[Moody] = Moody, **model: Any) -> Detection:
    """Return a task around the model, whose weights are the same every time."""
    torch.manual_seed(3)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    return Detection(model=kind(**model), optimizer=optimizer, class_names=NAMES, monitor="val/map")


def stamp(kind: str = "Moody", **model: Any) -> CheckpointStamp:
    """Return the callback that says how the model of ``make_task`` is built."""
    return CheckpointStamp(config={"model": {"_target_": f"guarded_models.{kind}", "num_classes": 2, **model}})


def fit(directory: Path, task: Detection, batches: list[Batch], guard: Guard | None, **settings: Any) -> L.Trainer:
    """Train on the batches in order and return the trainer."""
    from fake_models import loader, trainer

    model = {"dropout": 0.5} if task.model.dropout.p else {}
    callbacks = [
        stamp(type(task.model).__name__, **model),
        *([] if guard is None else [guard]),
        *settings.pop("callbacks", []),
    ]
    runner = trainer(directory, callbacks=callbacks, limit_val_batches=0, **settings)
    runner.fit(task, loader(*batches))
    return runner


def weights(task: Detection) -> dict[str, Tensor]:
    """Return copies of all weights and buffers by name."""
    return {name: value.clone() for name, value in task.model.state_dict().items()}
