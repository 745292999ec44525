"""Per-pixel truth and predictions: semantic and panoptic maps of one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from detseg.structures.base import TensorFields

IGNORE_INDEX = 255
"""The label of pixels that neither train nor count, as in VOC and Cityscapes."""


@dataclass
class SemanticMap(TensorFields):
    """A class for every pixel of one image.

    Attributes:
        labels: ``(H, W)`` int64 in 0..K-1, or ``ignore_index``.
        ignore_index: the label that neither trains nor counts.

    Raises:
        ValueError: ``labels`` is not a 2-d int64 tensor, or holds a negative label.
    """

    labels: Tensor
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != torch.int64:
            raise ValueError(
                f"SemanticMap: labels must be (H, W) int64, got {tuple(self.labels.shape)} {self.labels.dtype}"
            )
        if self.labels.device.type == "cpu" and self.labels.numel() and int(self.labels.min()) < 0:
            raise ValueError(
                f"SemanticMap: label {int(self.labels.min())} is below 0; unlabelled is {self.ignore_index}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.labels.shape[0], self.labels.shape[1]

    def resize(self, size: tuple[int, int]) -> Self:
        """Return the map at (height, width) ``size``, each pixel taking the nearest label."""
        if size == self.size:
            return self
        grown = torch.nn.functional.interpolate(self.labels[None, None].float(), size=size, mode="nearest-exact")
        return replace(self, labels=grown[0, 0].long())


@dataclass
class PanopticMap(TensorFields):
    """Every pixel in one segment: a thing (one object) or stuff (one class).

    Attributes:
        segments: ``(H, W)`` int64; 0 is void, s in 1..S is a row s - 1 of the fields below.
        labels: ``(S,)`` int64, the semantic class of each segment.
        is_thing: ``(S,)`` bool.

    Raises:
        ValueError: shapes disagree, or a pixel names a segment that has no label.
    """

    segments: Tensor
    labels: Tensor
    is_thing: Tensor

    def __post_init__(self) -> None:
        if self.segments.ndim != 2 or self.segments.dtype != torch.int64:
            raise ValueError(
                f"PanopticMap: segments must be (H, W) int64, got {tuple(self.segments.shape)} {self.segments.dtype}"
            )
        if self.labels.shape != self.is_thing.shape or self.labels.ndim != 1:
            raise ValueError(
                f"PanopticMap: labels {tuple(self.labels.shape)} and is_thing {tuple(self.is_thing.shape)} "
                "must both be (S,)"
            )
        if self.segments.device.type == "cpu" and self.segments.numel() and int(self.segments.max()) > len(self.labels):
            raise ValueError(f"PanopticMap: a pixel names segment {int(self.segments.max())} of {len(self.labels)}")
