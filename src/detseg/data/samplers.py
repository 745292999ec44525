"""Which image comes when: the same order for a seed and an epoch, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

Key = tuple[int, int] | tuple[int, int, int]
"""(epoch, index): what the samplers hand to a dataset, so that workers that outlive an epoch know which one it is; in
training also the number of the batch in its epoch, the same in every process."""


class _Sized(Dataset[int]):
    """A stand-in of known length: ``DistributedSampler`` wants a dataset but only asks for its length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index


class TrainSampler(DistributedSampler[int]):
    """Shuffles by (seed, epoch) and gives every rank the same number of images.

    It is a ``DistributedSampler`` so that Lightning calls ``set_epoch`` and does not wrap it in one of its own.

    Args:
        length: number of images.
        seed: with the epoch, decides the order.
        rank: this process.
        world_size: number of processes; the order's tail repeats its head where the images do not divide evenly.
        batch_size: images of one batch and process, by which keys get the number of their batch; ``None``: they do not.
    """

    def __init__(
        self, *, length: int, seed: int = 0, rank: int = 0, world_size: int = 1, batch_size: int | None = None
    ) -> None:
        super().__init__(_Sized(length), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.length, self.batch_size = length, batch_size
        self.skip = 0
        """Images of this process that the next pass leaves out at its start, once: a resumed run has had them."""

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]  # keys, not bare indices
        skip, self.skip = self.skip, 0
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        padded = np.resize(order, self.total_size)  # repeats from the start
        own = padded[self.rank :: self.num_replicas].tolist()[skip:]
        if self.batch_size is None:
            return iter([(self.epoch, index) for index in own])
        return iter([(self.epoch, index, place // self.batch_size) for place, index in enumerate(own, start=skip)])


class EvalSampler(DistributedSampler[int]):
    """Goes through the images in order; every image is seen by exactly one rank.

    torch's and Lightning's samplers repeat images until all ranks hold equally many, which counts those twice.

    Args:
        length: number of images.
        rank: this process, which gets images ``rank, rank + world_size, ...``.
        world_size: number of processes.
    """

    def __init__(self, *, length: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(_Sized(length), num_replicas=world_size, rank=rank, shuffle=False)
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]  # keys, not bare indices
        return iter([(0, index) for index in self.indices])
