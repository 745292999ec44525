"""Heads that say exactly what the truth is, so that decoding must give the objects back."""

from __future__ import annotations

import torch
from torch import Tensor

from detseg.structures import Detections, Target

SURE = 20.0  # logit of a peak; a cell at heat 0 has -SURE


def ideal_logits(heat: Tensor) -> Tensor:
    """Logits of the heatmap's own values, cut to what a float can say."""
    return torch.logit(heat.double(), eps=1e-8).clamp(-SURE, SURE).float()


def write_cells(shape: tuple[int, int, int, int], image: Tensor, cells: Tensor, values: Tensor) -> Tensor:
    """Return maps ``(B, C, H, W)`` that are -7 but at the cells ``(Q, 2)`` (column, row) of each image ``(Q,)``."""
    maps = torch.full(shape, -7.0)
    maps[image, :, cells[:, 1], cells[:, 0]] = values
    return maps


def target(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Target:
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        iscrowd=torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
    )


def in_order(boxes: Tensor, labels: Tensor) -> Tensor:
    """Return rows of label and box ``(N, 5)``, sorted, for comparing sets of objects."""
    rows = torch.cat([labels[:, None].float(), boxes], dim=1)
    for column in reversed(range(5)):
        rows = rows[rows[:, column].argsort(stable=True)]
    return rows


def sure(found: Detections, score: float = 0.99) -> Detections:
    return found[found.scores > score]


def scattered(count: int, size: tuple[int, int], classes: int, seed: int) -> Target:
    """Objects of random place and size, none of which shares a cell of 4 pixels with another at centre or corners."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[list[float]] = []
    taken: list[set[tuple[int, int]]] = [set(), set(), set()]
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    while len(kept) < count:
        corner = torch.rand(2, generator=generator) * (limit - 3)
        box = torch.cat([corner, torch.minimum(corner + 1 + torch.rand(2, generator=generator) * 40, limit)])
        points = box[:2], box[2:], (box[:2] + box[2:]) / 2
        cells = [(int(x) // 4, int(y) // 4) for x, y in (point.tolist() for point in points)]
        near = [
            any(abs(x - a) <= 1 and abs(y - b) <= 1 for a, b in seen) for (x, y), seen in zip(cells, taken, strict=True)
        ]
        if not any(near):
            kept.append(box.tolist())
            for cell, seen in zip(cells, taken, strict=True):
                seen.add(cell)
    return target(kept, torch.randint(0, classes, (count,), generator=generator).tolist())
