"""Fixed-size features of regions: RoIAlign of `"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_ (section 3).

On a pyramid each region reads the level that equation 1 of `"Feature Pyramid Networks"
<https://arxiv.org/abs/1612.03144>`_ gives it. The sampling is torchvision's ``roi_align`` with its old half-pixel shift
(``aligned=False``), which its published weights were trained with.

Letters: R regions of all images, C channels, P cells of a region's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detseg.ops.roi_align import pyramid_roi_align


class RegionAlign(nn.Module):
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
        super().__init__()
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.levels = levels
        self.canonical_size = canonical_size
        self.canonical_level = canonical_level

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return ``(R, C, P, P)``.

        Args:
            features: per level ``(B, C, H, W)``, finest first.
            regions: ``(R, 5)`` image index and xyxy pixels, as ``stack_regions`` gives them.
            strides: pixels per cell of each level.

        Raises:
            ValueError: there are fewer levels than regions shall be read from.
        """
        if len(features) < self.levels:
            raise ValueError(
                f"RegionAlign: levels is {self.levels}, but the backbone gives {len(features)}; set it to at most that"
            )
        used, strides = list(features[: self.levels]), strides[: self.levels]
        level = self.assign(regions[:, 1:], strides)  # (R,)
        return pyramid_roi_align(used, regions, level, strides, self.output_size, self.sampling_ratio)

    def assign(self, boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """Return the level that each box ``(R, 4)`` reads, ``(R,)`` int64 with 0 the finest."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()  # (R,)
        wanted = (self.canonical_level + (side / self.canonical_size).log2() + 1e-6).floor()  # (R,), eq. 1
        finest = math.log2(strides[0])
        return (wanted.clamp(finest, finest + self.levels - 1) - finest).long()  # (R,)


def stack_regions(boxes: Sequence[Tensor]) -> Tensor:
    """Return the boxes of all images ``(R, 5)``: image index and xyxy pixels.

    Args:
        boxes: per image ``(N, 4)``.
    """
    image = [torch.full_like(box[:, :1], index) for index, box in enumerate(boxes)]  # per image (N, 1)
    return torch.cat([torch.cat(image), torch.cat(list(boxes))], dim=1)  # (R, 5)
