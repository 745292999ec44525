"""Maps and targets for the tests of segmenters."""

from __future__ import annotations

import torch
from torch import Tensor

from detseg.structures import SemanticMap, Target


def target(labels: Tensor) -> Target:
    """Return truth without objects."""
    return Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels))


def maps(*sizes: tuple[int, int], classes: int = 3) -> list[Target]:
    """Return random truth of these sizes, a strip of each ignored."""
    found = []
    for height, width in sizes:
        labels = torch.randint(0, classes, (height, width))
        labels[:, : width // 4] = 255
        found.append(target(labels))
    return found
