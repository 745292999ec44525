"""A split as the loader sees it: samples transformed, augmentation drawn from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detseg.data.sample import Sample, SampleDataset
from detseg.data.samplers import Key
from detseg.structures import Target

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
"""A recipe: (image, target) -> (image, target)."""


class TransformedSplit(Dataset[Sample]):
    """Applies a recipe to a split.

    Args:
        samples: untransformed samples.
        transform: the recipe, or ``None`` to leave samples as they are.
        with_truth: keep the untransformed target as ``Sample.truth``, for metrics.
        seed: with epoch and index, decides the augmentation, so that it depends neither on the number of workers nor
            on what other code draws.
    """

    def __init__(
        self, *, samples: SampleDataset, transform: Transform | None, with_truth: bool = False, seed: int = 0
    ) -> None:
        self.samples, self.transform, self.with_truth, self.seed = samples, transform, with_truth, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> Sample:
        """Return a sample; ``key`` is (epoch, index) from our samplers, or a plain index, which means epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target, _ = self.samples[index]
        truth = target if self.with_truth else None
        if self.transform is None:
            return Sample(image, target, truth)
        with seeded(self.seed, epoch, index):
            image, target = self.transform(image, target)
        return Sample(image, target, truth)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from ``numbers`` (each >= 0); afterwards the old state is back."""
    state = torch.get_rng_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
