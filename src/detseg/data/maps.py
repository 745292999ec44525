"""Index maps: values checked against what is allowed, and the objects of an instance-id map."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detseg.data.check import DataError
from detseg.data.image import read_map
from detseg.ops import rle
from detseg.structures.maps import IGNORE_INDEX

Map = NDArray[np.int32]


def check_map(path: Path, size: tuple[int, int], allowed: Collection[int] | None) -> Map:
    """Return the map ``(H, W)`` of an image of (height, width) ``size``.

    Args:
        path: the map's file.
        size: what the map must measure.
        allowed: the values that it may hold, or ``None`` for any.

    Raises:
        DataError: another size, or a value that is not allowed; the message names file, value and what is allowed.
    """
    values = read_map(path)
    if values.shape != size:
        raise DataError(f"{path}: the map is {values.shape}, but its image is {size} (height, width); they must agree")
    if allowed is not None:
        counts = count_values(values)
        unknown = sorted(counts.keys() - set(allowed))
        if unknown:
            raise DataError(
                f"{path}: value {unknown[0]} ({counts[unknown[0]]} pixels) is not in the map of values; found there "
                f"{unknown[:8]}, allowed {sorted(allowed)[:40]}. List it in data.values, with a class or with null to "
                "ignore it"
            )
    return values


def count_values(values: Map) -> dict[int, int]:
    """Return value -> number of pixels, of the values that a map holds; 16 bits are counted, more are sorted."""
    if values.size and values.min() >= 0 and values.max() < 2**16:
        counts = np.bincount(values.reshape(-1))
        return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    found, numbers = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), numbers.tolist(), strict=True))


def identity_labels(num_classes: int) -> NDArray[np.uint8]:
    """Return the label of each value where value k is class k and 255 is ignored, ``(256,)``."""
    labels = np.full(256, IGNORE_INDEX, dtype=np.uint8)
    labels[:num_classes] = np.arange(num_classes)
    return labels


def segments(values: Map, *, skip: Collection[int] = (0,)) -> Iterator[tuple[int, list[float], bytes]]:
    """Yield (value, box xyxy, compressed code) of every value of an instance-id map but those to skip."""
    for value in np.unique(values).tolist():
        if value in skip:
            continue
        mask: NDArray[Any] = values == value
        code = rle.encode(torch.from_numpy(mask)[None])[0]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        yield value, [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)], code["counts"]
