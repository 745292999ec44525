"""Peaks of heatmaps, which stand in for boxes and NMS where a detector finds points.

Law and Deng 2018, `"CornerNet" <https://arxiv.org/abs/1808.01244>`_ (section 3.1), and Zhou et al. 2019, `"Objects as
Points" <https://arxiv.org/abs/1904.07850>`_ (section 4.1): a cell is a peak where none of its neighbours is larger,
found by max pooling; the best of all classes are kept.

Letters: B images, K classes, H and W rows and columns, n peaks per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Peaks(NamedTuple):
    """The best cells of each image, best first, ``(B, n)`` each.

    Attributes:
        values: of the heatmap, such as logits; -inf where an image has fewer peaks than n.
        labels: int64, the class.
        rows: int64.
        cols: int64.
    """

    values: Tensor
    labels: Tensor
    rows: Tensor
    cols: Tensor


def local_maxima(heat: Tensor, kernel: int = 3) -> Tensor:
    """Return the heatmap with -inf wherever a cell of the same class in the window around it is larger.

    Of equal neighbours the first stays, in reading order: in 16 bits the top of a broad peak is flat, and would be
    found several times.

    Args:
        heat: ``(B, K, H, W)``, floating point.
        kernel: odd side of the window, in cells; 1 keeps every cell.

    Raises:
        ValueError: ``kernel`` is even or not positive.
    """
    check_kernel("local_maxima", kernel)
    first = F.max_pool2d(heat, kernel, stride=1, padding=kernel // 2, return_indices=True)[1]  # (B, K, H, W)
    own = torch.arange(first[0, 0].numel(), device=heat.device).view(first.shape[2:])  # (H, W)
    return heat.masked_fill(first != own, -torch.inf)


def top_peaks(heat: Tensor, count: int) -> Peaks:
    """Return the ``count`` best cells of each image, over all classes.

    Args:
        heat: ``(B, K, H, W)``.
        count: how many; fewer where the image has not so many cells.
    """
    _, classes, height, width = heat.shape
    count = min(count, classes * height * width)
    values, index = heat.flatten(1).topk(count)  # (B, n) each
    cell = index % (height * width)  # (B, n)
    return Peaks(values, index // (height * width), cell // width, cell % width)


def check_kernel(owner: str, kernel: int) -> None:
    """Raise unless the side of a window has a middle.

    Raises:
        ValueError: it is even or not positive.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{owner}: kernel is {kernel}; a window around a cell has an odd side, such as 3")
