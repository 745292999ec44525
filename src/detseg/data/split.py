"""A split as the loader sees it: samples transformed, augmentation drawn from (seed, epoch, index)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detseg.data.augment import Context, Scene
from detseg.data.sample import Sample, SampleDataset
from detseg.data.samplers import Key
from detseg.data.transforms import Recipe
from detseg.data.watch import Watch
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
        name: of the split, for messages.
        epochs: of the whole training, whose last ones a recipe may augment less; ``None``: unknown.
    """

    def __init__(
        self,
        *,
        samples: SampleDataset,
        transform: Transform | None,
        with_truth: bool = False,
        seed: int = 0,
        name: str = "",
        epochs: int | None = None,
    ) -> None:
        self.samples, self.transform, self.with_truth, self.seed = samples, transform, with_truth, seed
        self.name, self.epochs = name, epochs
        self.watch: Watch | None = None
        """Where workers say what they read; the data module sets it."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> Sample:
        """Return a sample.

        Args:
            key: from our samplers, (epoch, index) or (epoch, index, number of the batch); or a plain index, which
                means epoch 0. Without a batch it is batch 0.
        """
        epoch, index, *batch = key if isinstance(key, tuple) else (0, key)
        with nullcontext() if self.watch is None else self.watch.reading(epoch, index):
            return self._sample(epoch, index, batch[0] if batch else 0)

    def _sample(self, epoch: int, index: int, batch: int) -> Sample:
        image, target, _ = self.samples[index]
        truth = replace(target, proposals=None) if self.with_truth else None
        transform = self.transform
        if transform is None:
            return Sample(image, target, truth)
        if isinstance(transform, Recipe) and transform.augment is not None:
            transform = partial(transform, context=self._context(epoch, batch))
        with seeded(self.seed, epoch, index):
            image, target = transform(image, target)
        return Sample(image, target, truth)

    def _context(self, epoch: int, batch: int) -> Context:
        """Return what a recipe may know beside the image."""

        def read(other: int) -> Scene:
            with nullcontext() if self.watch is None else self.watch.reading(epoch, other), seeded(self.seed, other):
                image, target, _ = self.samples[other]  # whatever reading draws, it leaves the sample's own numbers
            return image, target

        return Context(
            images=len(self.samples), read=read, seed=self.seed, epoch=epoch, batch=batch, epochs=self.epochs
        )


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Draw torch's random numbers on the CPU, numpy's and Python's from ``numbers`` (each >= 0).

    Afterwards the old states are back.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # recipes of a user's own may draw from these two
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
