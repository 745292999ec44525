"""Masks as polygons and as COCO's run-length codes, through pycocotools.

COCO counts runs of zeros and ones in turn, down the columns, zeros first. "Uncompressed" is that list of counts;
"compressed" is a string of 5-bit groups of their differences (pycocotools/common/maskApi.c, ``rleToString``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor


class RLE(TypedDict):
    """A compressed run-length code: ``size`` is [height, width], ``counts`` the string as ASCII bytes."""

    size: list[int]
    counts: bytes


Ring = Sequence[float] | NDArray[np.float64]
"""A polygon as flat x, y, x, y, ... in pixels, where (0, 0) is the outer corner of the first pixel."""


def encode(masks: Tensor) -> list[RLE]:
    """Return the code of each of ``masks`` (N, H, W) bool."""
    if masks.ndim != 3:
        raise ValueError(f"encode: masks must be (N, H, W), got {tuple(masks.shape)}")
    columns = np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))  # (H, W, N)
    return list(coco_mask.encode(columns)) if len(masks) else []


def decode(codes: Sequence[RLE], size: tuple[int, int]) -> Tensor:
    """Return masks ``(N, H, W)`` bool; ``size`` (h, w) gives the shape where there are no codes.

    Raises:
        ValueError: a code is of another size.
    """
    if not codes:
        return torch.zeros((0, *size), dtype=torch.bool)
    for row, code in enumerate(codes):
        if tuple(code["size"]) != tuple(size):
            raise ValueError(f"decode: code {row} is of size {tuple(code['size'])}, wanted {tuple(size)}")
    stack = coco_mask.decode(list(codes))  # (H, W, N), columns first in memory
    return torch.from_numpy(stack.transpose(2, 0, 1)).view(torch.bool).contiguous()  # (N, H, W); bytes are 0 and 1


def polygons_to_rle(rings: Sequence[Ring], size: tuple[int, int]) -> RLE:
    """Return the code of the union of ``rings`` on an image of (height, width) ``size``.

    Raises:
        ValueError: no ring, or one with fewer than three points or an odd number of coordinates.
    """
    if not rings:
        raise ValueError("polygons_to_rle: an object needs at least one ring")
    for ring in rings:
        if len(ring) < 6 or len(ring) % 2:
            raise ValueError(f"polygons_to_rle: a ring needs 3 or more x, y pairs, got {len(ring)} numbers")
    codes = coco_mask.frPyObjects([np.asarray(ring, dtype=np.float64).tolist() for ring in rings], *size)
    return _as_rle(coco_mask.merge(codes))


def polygons_to_mask(rings: Sequence[Ring], size: tuple[int, int]) -> Tensor:
    """Return the union of ``rings`` as a mask ``(H, W)`` bool; an object without rings is empty."""
    if not rings:
        return torch.zeros(size, dtype=torch.bool)
    return decode([polygons_to_rle(rings, size)], size)[0]


def compress(counts: Sequence[int], size: tuple[int, int]) -> RLE:
    """Return the compressed code of an uncompressed one.

    Raises:
        ValueError: a count is negative, or they do not sum to height x width.
    """
    check_counts(counts, size)
    return _as_rle(coco_mask.frPyObjects({"size": list(size), "counts": list(counts)}, *size))


def check_counts(counts: Sequence[int] | NDArray[np.int64], size: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless ``counts`` are runs that fill an image of (height, width) ``size``."""
    total = int(np.sum(np.asarray(counts, dtype=np.int64))) if len(counts) else 0
    lowest = min(counts, default=0)
    if total != size[0] * size[1] or lowest < 0:
        raise ValueError(
            f"the runs sum to {total} pixels and the shortest is {lowest}; an image of {size[0]} x {size[1]} "
            f"(height x width) needs runs >= 0 that sum to {size[0] * size[1]}"
        )


def counts_of(code: bytes) -> list[int]:
    """Return the run lengths in a compressed string.

    Each group holds five bits, lowest first, and a bit that says whether more follow; the last is sign-extended; from
    the fourth run on, a number is the difference to the run two before (maskApi.c, ``rleFrString``).

    Raises:
        ValueError: a character is none of the code's 64, or the string ends within a number.
    """
    counts: list[int] = []
    value = shift = 0
    for character in code:
        group = character - 48
        if not 0 <= group < 64:
            raise ValueError(f"character {chr(character)!r} is not part of a run-length code")
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the run-length code ends within a number")
    return counts


def areas(codes: Sequence[RLE]) -> NDArray[np.float64]:
    """Return the number of pixels in each mask."""
    return np.asarray(coco_mask.area(list(codes)), dtype=np.float64) if codes else np.zeros(0)


def boxes(codes: Sequence[RLE]) -> NDArray[np.float64]:
    """Return the boxes ``(N, 4)`` xyxy around the masks, to the outer edges of pixels; zeros for an empty mask."""
    if not codes:
        return np.zeros((0, 4))
    xywh = np.asarray(coco_mask.toBbox(list(codes)), dtype=np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _as_rle(code: Any) -> RLE:
    return RLE(size=[int(side) for side in code["size"]], counts=bytes(code["counts"]))
