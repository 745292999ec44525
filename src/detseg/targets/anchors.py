"""Anchors of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_, section 3.1.1, on every level of a pyramid.

The pyramid is that of `"Feature Pyramid Networks" <https://arxiv.org/abs/1612.03144>`_, section 4.1.
Corners are rounded to whole pixels and centred on the corner of a cell, as in torchvision, so that its published
weights fit. Differs from torchvision: no module and no state; the grids of a size are built once and shared.

Letters: L levels, A anchors per cell, H and W cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Stride = float | tuple[float, float]
"""Pixels between neighbouring cells: one number, or (vertical, horizontal)."""


class AnchorGenerator:
    """Boxes of fixed sizes and shapes at every cell of every level.

    Args:
        sizes: per level, the sides in pixels of a square of equal area, such as ``[[32], [64], [128]]``.
        ratios: per level, height / width; one list serves all levels where only one is given.

    Raises:
        ValueError: a level is empty, a number is not positive, or the lists disagree in length.
    """

    def __init__(self, *, sizes: Sequence[Sequence[float]], ratios: Sequence[Sequence[float]]) -> None:
        if len(ratios) == 1:
            ratios = list(ratios) * len(sizes)
        if len(sizes) != len(ratios):
            raise ValueError(
                f"AnchorGenerator: sizes has {len(sizes)} levels but ratios has {len(ratios)}; give one list per level"
            )
        for level, values in enumerate(zip(sizes, ratios, strict=True)):
            if not all(values) or min(min(value) for value in values) <= 0:
                raise ValueError(f"AnchorGenerator: level {level} has sizes and ratios {values}; all must be positive")
        self.sizes = tuple(tuple(float(size) for size in level) for level in sizes)
        self.ratios = tuple(tuple(float(ratio) for ratio in level) for level in ratios)

    def num_anchors(self) -> list[int]:
        """Return A, the anchors per cell, of each level."""
        return [len(sizes) * len(ratios) for sizes, ratios in zip(self.sizes, self.ratios, strict=True)]

    def strides(
        self, image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], nominal: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Return torchvision's strides of each level, see ``grid_strides``; ``nominal`` is not read."""
        return [*grid_strides(image_size, feature_sizes)]

    def __call__(
        self,
        feature_sizes: Sequence[tuple[int, int]],
        strides: Sequence[Stride],
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """Return the anchors of each level ``(H * W * A, 4)`` float32 xyxy, cell by cell in reading order.

        The tensors are shared between calls: never change them in place.

        Args:
            feature_sizes: (H, W) of each level.
            strides: of each level; ``grid_strides`` gives torchvision's.
            device: where the anchors shall live.

        Raises:
            ValueError: the number of levels is not the one that the sizes were given for.
        """
        if not len(feature_sizes) == len(strides) == len(self.sizes):
            raise ValueError(
                f"AnchorGenerator: sizes are given for {len(self.sizes)} levels, but the features have "
                f"{len(feature_sizes)} and the strides {len(strides)}; give one list of anchor sizes per level"
            )
        levels = zip(feature_sizes, strides, self.sizes, self.ratios, strict=True)
        lay = _grid.__wrapped__ if torch.compiler.is_compiling() else _grid  # an export's tensors hold no numbers
        return [
            lay((int(size[0]), int(size[1])), stride if isinstance(stride, tuple) else (stride, stride), s, r, device)
            for size, stride, s, r in levels
        ]

    def __repr__(self) -> str:
        return f"AnchorGenerator(sizes={self.sizes}, ratios={self.ratios})"


def grid_strides(image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the strides (vertical, horizontal) that torchvision infers: image side // cells.

    They differ from powers of two where a level was rounded up: 800 pixels have 13 cells on P6, so 61 instead of 64.
    Published weights were trained so.
    """
    return [(image_size[0] // height, image_size[1] // width) for height, width in feature_sizes]


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Return the anchors of one cell ``(A, 4)`` about the origin, rounded to whole pixels; ratios vary slowest."""
    height = torch.tensor(ratios).sqrt()  # (R,) sides of a unit square stretched to each ratio
    half = torch.stack([1 / height, height], dim=1)[:, None] * torch.tensor(sizes)[None, :, None] / 2  # (R, S, 2)
    half = half.reshape(-1, 2)  # (A, 2)
    return torch.cat([-half, half], dim=1).round()  # (A, 4)


@lru_cache(maxsize=128)
def _grid(
    size: tuple[int, int],
    stride: tuple[float, float],
    sizes: tuple[float, ...],
    ratios: tuple[float, ...],
    device: torch.device | str,
) -> Tensor:
    # A tensor born in inference mode may not be saved for backward, and this one outlives the mode.
    with torch.inference_mode(False), torch.no_grad():
        y = torch.arange(size[0], dtype=torch.float32) * stride[0]  # (H,)
        x = torch.arange(size[1], dtype=torch.float32) * stride[1]  # (W,)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 1, 2)  # (H * W, 1, 2) as x, y
        anchors = grid.repeat(1, 1, 2) + base_anchors(sizes, ratios)  # (H * W, A, 4)
        return anchors.reshape(-1, 4).to(device)  # (H * W * A, 4)
