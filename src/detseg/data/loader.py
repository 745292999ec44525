"""The loader that every split is read through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from detseg.data.sample import Sample


class LateLoader(DataLoader[Sample]):
    """Reads nothing before its first batch is asked for.

    In a resumed run Lightning makes the iterator before it tells the sampler its epoch; workers would by then have
    begun with the images of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator around torch's iterator
        yield from super().__iter__()
