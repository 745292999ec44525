"""Batches on their way from a worker: a few large tensors instead of hundreds of small ones.

Every tensor that leaves a worker takes a file descriptor and a shared memory block until it is freed. A batch of 64
targets with eight tensors each, twice (targets and truths), meets the usual limit of 1,024 open files
(https://github.com/pytorch/pytorch/issues/973). Packed, a batch takes one per type of number.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detseg.data.sample import Sample
from detseg.structures import Batch

_Place = tuple[torch.dtype, int, tuple[int, ...]]
"""Where a tensor went: the buffer of its type, its start there, its shape."""


class Parcel:
    """A batch that pickles as one buffer per type of number and unpickles as the batch itself."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[bytes, dict[torch.dtype, Tensor]]]:
        return unpack, pack(self.batch)


def ship(collate: Callable[[Sequence[Sample]], Batch], samples: Sequence[Sample]) -> Parcel:
    """Collate in a worker; the main process receives the ``Batch``."""
    return Parcel(collate(samples))


def pack(batch: Batch) -> tuple[bytes, dict[torch.dtype, Tensor]]:
    """Return the batch without its numbers, pickled, and its numbers in one flat tensor per type."""
    writer = _Writer()
    skeleton = writer.write(batch)
    return skeleton, {dtype: torch.cat(tensors) for dtype, tensors in writer.tensors.items()}


def unpack(skeleton: bytes, buffers: dict[torch.dtype, Tensor]) -> Batch:
    """Return the batch that :func:`pack` took apart; its tensors are views of the buffers."""
    batch = _Reader(skeleton, buffers).load()
    assert isinstance(batch, Batch)
    return batch


class _Writer:
    """Pickles a batch and sets its tensors aside, by type."""

    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, list[Tensor]] = {}
        self._used: dict[torch.dtype, int] = {}

    def write(self, batch: Batch) -> bytes:
        """Return the pickled batch, in which places stand for the tensors."""
        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._place  # type: ignore[method-assign]  # the documented way without a subclass
        pickler.dump(batch)
        return stream.getvalue()

    def _place(self, value: Any) -> _Place | None:
        if not isinstance(value, Tensor):
            return None
        start = self._used.get(value.dtype, 0)
        self._used[value.dtype] = start + value.numel()
        self.tensors.setdefault(value.dtype, []).append(value.as_subclass(Tensor).reshape(-1))
        return value.dtype, start, tuple(value.shape)


class _Reader(pickle.Unpickler):
    """Puts views of the buffers where the places stand."""

    def __init__(self, skeleton: bytes, buffers: dict[torch.dtype, Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._buffers = buffers

    def persistent_load(self, pid: _Place) -> Tensor:
        """Return the tensor of a place; ``view`` raises where the buffer is too short."""
        dtype, start, shape = pid
        count = 1
        for side in shape:
            count *= side
        return self._buffers[dtype][start : start + count].view(shape)
