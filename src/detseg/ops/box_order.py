"""Orders of boxes that nothing ranks: they look random, yet the same boxes always come in the same order.

So that the first of them are a fair sample of all, whatever the process, the number of threads, and the order in which
they were found.

Letters: N boxes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms


def chance_order(boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows ``(N,)`` of ``boxes`` in an order that depends on the boxes alone.

    Args:
        boxes: ``(N, 4)`` xyxy, whole pixels from 0 to 65,535, each once.
    """
    return np.argsort(_mixed(boxes))


def spread_order(boxes: NDArray[np.int64], *, duplicate: float) -> NDArray[np.int64]:
    """Return the rows ``(N,)`` in ``chance_order``, but boxes that resemble an earlier one after all others.

    Args:
        boxes: ``(N, 4)`` xyxy, whole pixels from 0 to 65,535, each once.
        duplicate: IoU with a box of the first part from which on a box belongs to the second.
    """
    order = chance_order(boxes)
    ranks = torch.arange(len(order), dtype=torch.float32)  # (N,) float32 counts exactly up to 16 million
    kept = nms(torch.from_numpy(boxes[order]).float(), -ranks, duplicate).numpy()  # best, here earliest, first
    rest = np.delete(np.arange(len(order)), kept)
    spread: NDArray[np.int64] = order[np.concatenate([kept, rest])]
    return spread


def _mixed(boxes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a number ``(N,)`` per box, no two the same: the four coordinates side by side, mixed.

    The mixing is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195),
    which can be undone, so that nothing collides.
    """
    shift = np.array([0, 16, 32, 48], dtype=np.uint64)
    value = np.bitwise_or.reduce(boxes.astype(np.uint64) << shift, axis=1)  # (N,)
    for turn, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(turn))) * np.uint64(factor)  # wraps round
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
