"""A linear model under Lightning, for tests of what surrounds training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyTask(L.LightningModule):
    """Learns y = sum of x; its model has a weight, a batch norm and a head over ``num_classes`` outputs."""

    def __init__(self, *, num_classes: int = 2, lr: float = 0.05) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes))
        self.model.num_classes = num_classes
        self.class_names = [f"class{label}" for label in range(num_classes)]
        self.lr = lr
        self.seen: list[Tensor] = []  # the first weight at every validation

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss = (self.model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (x,) = batch
        self.seen.append(self.model[0].weight.detach().clone())
        self.log("val/map", -(self.model(x) - x.sum(dim=1, keepdim=True)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def _loader(self) -> DataLoader[Any]:
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), batch_size=4)

    train_dataloader = val_dataloader = _loader


def fit(task: L.LightningModule, directory: Path, *callbacks: L.Callback, epochs: int = 2, **trainer: Any) -> L.Trainer:
    """Train on the CPU without a bar and return the trainer."""
    trainer.setdefault("logger", False)
    built = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=directory,
        enable_progress_bar=any("Progress" in type(callback).__name__ for callback in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks)} | trainer,
    )
    built.fit(task)
    return built
