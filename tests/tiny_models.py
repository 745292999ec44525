"""A detector that needs no training: it finds the bright rectangle. And functions that must never be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detseg.structures import Detections, SemanticMap

CALLED: list[str] = []


def trap(**_: Any) -> None:
    CALLED.append("trap")


class BrightBox(nn.Module):
    """One detection per image: the box around the pixels brighter than ``threshold``; its label is the largest row."""

    def __init__(self, *, num_classes: int, threshold: float = 0.5, weights: str | list[float] | None = None) -> None:
        super().__init__()
        self.num_classes, self.weights = num_classes, weights
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, num_classes)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Any = None) -> Tensor:
        return images.mean(dim=1) > self.threshold  # (B, H, W)

    def predict(self, outputs: Tensor, sizes: Tensor) -> list[Detections]:
        return [self._one(bright[:h, :w]) for bright, (h, w) in zip(outputs, sizes.tolist(), strict=True)]

    def _one(self, bright: Tensor) -> Detections:
        rows, columns = bright.nonzero(as_tuple=True)
        if not len(rows):
            return Detections.empty(mask_size=(bright.shape[0], bright.shape[1]))
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()[None]
        label = int(self.head.weight.sum(dim=1).argmax())
        return Detections(boxes=box, scores=torch.ones(1), labels=torch.tensor([label]), masks=bright[None])


class BrightMap(BrightBox):
    """The same as a semantic map: 1 where bright."""

    def predict(self, outputs: Tensor, sizes: Tensor) -> list[SemanticMap]:
        return [SemanticMap(bright[:h, :w].long()) for bright, (h, w) in zip(outputs, sizes.tolist(), strict=True)]
