"""Small models that obey the contract and know nothing, for tests of what surrounds a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detseg.structures import Batch, Detections, SemanticMap, Target


@dataclass
class FakeOutputs:
    scores: Tensor  # (B, K)
    features: Tensor  # (B, 4)


class FakeDetector(nn.Module):
    """Answers every image with the boxes that it was told, whatever is in it."""

    def __init__(self, *, num_classes: int = 2, answer: Detections | None = None, bad: bool = False) -> None:
        super().__init__()
        self.num_classes, self.answer, self.bad = num_classes, answer or Detections.empty(), bad
        self.backbone = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3), "fpn": nn.Conv2d(4, 4, 1)})
        self.head = nn.Linear(4, num_classes)
        self.norm = nn.LayerNorm(4)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> FakeOutputs:
        features = self.backbone["fpn"](self.backbone["body"](images)).mean(dim=(2, 3))  # (B, 4)
        return FakeOutputs(self.head(features), self.norm(features))

    def loss(self, outputs: FakeOutputs, targets: list[Target]) -> dict[str, Tensor]:
        factor = float("nan") if self.bad else 1.0
        return {
            "loss_classification": outputs.scores.square().mean() * factor,
            "loss_box": outputs.features.square().mean(),
        }

    def predict(self, outputs: FakeOutputs, sizes: Tensor) -> list[Detections]:
        return [self.answer for _ in range(len(sizes))]

    def diagnostics(self, outputs: FakeOutputs, targets: list[Target]) -> dict[str, Tensor]:
        return {"positives_p3": torch.tensor(float(sum(len(target) for target in targets)))}


class FakeTwoStage(FakeDetector):
    """Also proposes what it answers."""

    def proposals(self, outputs: FakeOutputs, sizes: Tensor) -> list[Detections]:
        return [self.answer for _ in range(len(sizes))]


class FakeSegmenter(nn.Module):
    """Calls every pixel what it was told."""

    def __init__(self, *, num_classes: int = 3, label: int = 1) -> None:
        super().__init__()
        self.num_classes, self.label = num_classes, label
        self.head = nn.Conv2d(3, num_classes, 1)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Any = None) -> Tensor:
        return self.head(images)

    def loss(self, outputs: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        return {"loss_cross_entropy": outputs.square().mean()}

    def predict(self, outputs: Tensor, sizes: Tensor) -> list[SemanticMap]:
        return [SemanticMap(torch.full((int(h), int(w)), self.label)) for h, w in sizes.tolist()]


def batch(targets: list[Target], truths: list[Target] | None = None, side: int = 16) -> Batch:
    """Return grey images of one size with the given truth."""
    count = len(targets)
    return Batch(
        images=torch.full((count, 3, side, side), 0.5),
        sizes=torch.full((count, 2), side),
        targets=targets,
        truths=truths,
    )


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    """Return boxes (N, 4) xyxy."""
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def loader(*batches: Any) -> DataLoader[Any]:
    """Return a loader of ready batches."""
    return DataLoader(list(batches), batch_size=None)


def trainer(directory: Path, **settings: Any) -> L.Trainer:
    """Return a quiet trainer on the CPU that logs every step and keeps nothing."""
    settings = {"max_epochs": 1, "log_every_n_steps": 1, "logger": False} | settings
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **settings,
    )


class GridProposer:
    """Proposes the four quarters of an image, or nothing for one that is black at its first pixel."""

    key = "GridProposer()"

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if int(image[0, 0, 0]) == 0:
            return torch.zeros((0, 4))
        corner = torch.tensor([[0, 0], [width // 2, 0], [0, height // 2], [width // 2, height // 2]])
        return torch.cat([corner, corner + torch.tensor([width // 2, height // 2])], dim=1).float()


class FakeRegions(FakeTwoStage):
    """Is given proposals, remembers them, and proposes and finds them again."""

    def __init__(self, *, num_classes: int = 2) -> None:
        super().__init__(num_classes=num_classes)
        self.proposer = GridProposer()
        self.given: list[list[Tensor] | None] = []

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        targets: list[Target] | None = None,
        proposals: list[Tensor] | None = None,
    ) -> FakeOutputs:
        self.given.append(proposals)
        return super().forward(images, sizes, targets)

    def proposals(self, outputs: FakeOutputs, sizes: Tensor) -> list[Detections]:
        return [
            Detections(boxes, torch.linspace(1, 0.5, len(boxes)), torch.zeros(len(boxes), dtype=torch.int64))
            for boxes in self.given[-1] or []
        ]

    predict = proposals
