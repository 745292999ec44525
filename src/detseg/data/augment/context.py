"""What a recipe may know beside the image that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detseg.structures import Target

Scene = tuple[Tensor, Target]
"""An image ``(3, H, W)`` uint8 and the truth in its pixels."""


@dataclass(frozen=True)
class Context:
    """Where in a training a sample stands, and the way to the other images.

    Attributes:
        images: how many there are in the split; 0: none can be read.
        read: number -> image as it is in the files, through the reader and cache of the split.
        seed: of the data's order and augmentation.
        epoch: counted from 0.
        batch: number of the sample's batch in its epoch, the same in every process.
        epochs: of the whole training; ``None``: unknown, or without end.
    """

    images: int
    read: Callable[[int], Scene]
    seed: int = 0
    epoch: int = 0
    batch: int = 0
    epochs: int | None = None

    def another(self) -> Scene:
        """Read an image drawn at random; it may be any, the sample's own too."""
        return self.read(int(torch.randint(self.images, ())))

    def choice(self, count: int, *, every: int = 1) -> int:
        """Return a number below ``count``, drawn anew every ``every`` batches: one for all samples of a batch."""
        numbers = np.random.SeedSequence([self.seed, self.epoch, self.batch // every, 0xBA7C4])  # not a sample's own
        return int(np.random.default_rng(numbers).integers(count))
