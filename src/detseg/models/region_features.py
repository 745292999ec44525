"""Fixed-size features of regions: RoIPool of Fast R-CNN, RoIAlign of Mask R-CNN.

`"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_ (section 2.1), `"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_
(section 3). On a pyramid each region reads the level that equation 1 of `"Feature Pyramid Networks"
<https://arxiv.org/abs/1612.03144>`_ gives it. The sampling is torchvision's: ``roi_pool``, and ``roi_align`` with its
old half-pixel shift (``aligned=False``), which its published weights were trained with.

Letters: R regions of all images, C channels, P cells of a region's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from detseg.ops.roi_align import by_level, pyramid_roi_align
from detseg.ops.roi_pool import roi_pool


class RegionFeatures(nn.Module):
    """Base of all that turns regions of an image into features of one size; a constructor argument of the branches."""

    def shape(self, channels: int) -> tuple[int, ...]:
        """Return the shape of one region's features where the maps have ``channels``, such as (256, 7, 7)."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return the features of all regions ``(R, *shape)``.

        Args:
            features: per level ``(B, C, H, W)``, finest first.
            regions: ``(R, 5)`` image index and xyxy pixels, as ``stack_regions`` gives them.
            strides: pixels per cell of each level.
        """
        raise NotImplementedError


class RegionGrid(RegionFeatures):
    """Base of those that give a region P x P cells, read from one level of a pyramid.

    Args:
        output_size: P, cells of a region's side.
        levels: how many pyramid levels, from the finest, regions are read from; the coarser ones serve the RPN alone.
        canonical_size: side in pixels of a region that reads ``canonical_level`` (equation 1: 224, ImageNet's side).
        canonical_level: log2 of the stride of that level (equation 1: k0 = 4).
    """

    def __init__(self, *, output_size: int, levels: int, canonical_size: float, canonical_level: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.levels = levels
        self.canonical_size = canonical_size
        self.canonical_level = canonical_level

    def shape(self, channels: int) -> tuple[int, ...]:
        """Return (C, P, P)."""
        return channels, self.output_size, self.output_size

    def assign(self, boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """Return the level that each box ``(R, 4)`` reads, ``(R,)`` int64 with 0 the finest."""
        return assign_levels(boxes, strides[: self.levels], self.canonical_size, self.canonical_level)

    def used(self, features: Sequence[Tensor], strides: Sequence[int]) -> tuple[list[Tensor], Sequence[int]]:
        """Return the levels that regions are read from, and their strides.

        Raises:
            ValueError: there are fewer levels than regions shall be read from.
        """
        if len(features) < self.levels:
            raise ValueError(
                f"{type(self).__name__}: levels is {self.levels}, but the backbone gives {len(features)}; set it to "
                "at most that"
            )
        return list(features[: self.levels]), strides[: self.levels]


class RegionAlign(RegionGrid):
    """Cut every region out of the feature maps by RoIAlign.

    Args:
        output_size: P, cells of a region's side.
        sampling_ratio: bilinear samples per cell and axis; 0 takes as many as the region has pixels.
        levels: how many pyramid levels, from the finest, regions are read from; the coarser ones serve the RPN alone.
        canonical_size: side in pixels of a region that reads ``canonical_level`` (equation 1: 224, ImageNet's side).
        canonical_level: log2 of the stride of that level (equation 1: k0 = 4).
    """

    def __init__(
        self,
        *,
        output_size: int = 7,
        sampling_ratio: int = 2,
        levels: int = 4,
        canonical_size: float = 224.0,
        canonical_level: int = 4,
    ) -> None:
        super().__init__(
            output_size=output_size,
            levels=levels,
            canonical_size=canonical_size,
            canonical_level=canonical_level,
        )
        self.sampling_ratio = sampling_ratio

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return ``(R, C, P, P)``; see ``RegionFeatures``.

        Raises:
            ValueError: there are fewer levels than regions shall be read from.
        """
        used, strides = self.used(features, strides)
        level = self.assign(regions[:, 1:], strides)  # (R,)
        return pyramid_roi_align(used, regions, level, strides, self.output_size, self.sampling_ratio)


class RegionPool(RegionGrid):
    """Cut every region out of the feature maps by RoIPool: the maximum of each cell, whose borders are whole cells.

    Args:
        output_size: P, cells of a region's side.
        levels: how many pyramid levels, from the finest, regions are read from; 1 for a single map, as in the paper.
        canonical_size: side in pixels of a region that reads ``canonical_level``; see ``RegionAlign``.
        canonical_level: log2 of the stride of that level.
    """

    def __init__(
        self,
        *,
        output_size: int = 7,
        levels: int = 1,
        canonical_size: float = 224.0,
        canonical_level: int = 4,
    ) -> None:
        super().__init__(
            output_size=output_size,
            levels=levels,
            canonical_size=canonical_size,
            canonical_level=canonical_level,
        )

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return ``(R, C, P, P)``; see ``RegionFeatures``.

        Raises:
            ValueError: there are fewer levels than regions shall be read from.
        """
        used, strides = self.used(features, strides)
        regions = regions.float()  # in half precision coordinates are off by whole pixels
        level = self.assign(regions[:, 1:], strides)  # (R,)
        features = [feature.float() for feature in used]
        return by_level(partial(roi_pool, output_size=self.output_size), features, regions, level, strides)


def assign_levels(boxes: Tensor, strides: Sequence[int], canonical_size: float, canonical_level: int) -> Tensor:
    """Return the pyramid level that each box reads, ``(R,)`` int64 with 0 the finest (FPN, equation 1).

    Args:
        boxes: ``(R, 4)`` xyxy pixels.
        strides: of the levels that regions are read from; each twice the one before.
        canonical_size: side in pixels of a box that reads ``canonical_level``.
        canonical_level: log2 of the stride of that level.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()  # (R,)
    wanted = (canonical_level + (side / canonical_size).log2() + 1e-6).floor()  # (R,), eq. 1
    finest = math.log2(strides[0])
    return (wanted.clamp(finest, finest + len(strides) - 1) - finest).long()  # (R,)


def stack_regions(boxes: Sequence[Tensor]) -> Tensor:
    """Return the boxes of all images ``(R, 5)``: image index and xyxy pixels.

    Args:
        boxes: per image ``(N, 4)``.
    """
    image = [torch.full_like(box[:, :1], index) for index, box in enumerate(boxes)]  # per image (N, 1)
    return torch.cat([torch.cat(image), torch.cat(list(boxes))], dim=1)  # (R, 5)
