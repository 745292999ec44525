"""Regions cut out of the image itself and warped to one size: the features of R-CNN.

Girshick et al. 2014, `"R-CNN" <https://arxiv.org/abs/1311.2524>`_, section 2.1 and appendix A: anisotropic warping with
context. Bilinear interpolation at the pixels' centres, as in the authors' release, which does not smooth before it
shrinks. Differs: the release rounds the widened region to whole pixels, and its content within the frame. Here an image
goes on as zeros in all directions, which is the mean colour after normalisation and what a batch is padded with, so
that a crop does not depend on the padding.

Letters: R regions of all images, S pixels of a crop's side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from detseg.models.region_features import RegionFeatures


class WarpedCrop(RegionFeatures):
    """Warp every region, whatever its shape, to a square crop of the image.

    Args:
        output_size: S, pixels of a crop's side, as the network above takes it.
        context: pixels of each side of a crop that show what lies around the region (appendix A: p = 16 of 227).

    Raises:
        ValueError: the context leaves no pixel for the region.
    """

    def __init__(self, *, output_size: int = 227, context: float = 16.0) -> None:
        super().__init__()
        if output_size < 1 or not 0 <= 2 * context < output_size:
            raise ValueError(
                f"WarpedCrop: output_size={output_size}, context={context}; a context of at least 0 on both sides must "
                "leave room for the region"
            )
        self.output_size = output_size
        self.context = float(context)

    def shape(self, channels: int) -> tuple[int, ...]:
        """Return (C, S, S)."""
        return channels, self.output_size, self.output_size

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return crops ``(R, C, S, S)`` of the first level; see ``RegionFeatures``.

        With torchvision's RoIAlign of one sample per cell, which lies in its centre.
        """
        bordered = F.pad(features[0].float(), (1, 1, 1, 1))  # (B, C, H + 2, W + 2); beyond, RoIAlign repeats a border
        windows = widen(regions[:, 1:].float() / strides[0], self.output_size, self.context) + 1  # (R, 4)
        placed = torch.cat([regions[:, :1].float(), windows], dim=1)  # (R, 5)
        crops: Tensor = torchvision.ops.roi_align(bordered, placed, self.output_size, sampling_ratio=1, aligned=True)
        return crops  # (R, C, S, S)


def widen(boxes: Tensor, size: int, context: float) -> Tensor:
    """Return boxes ``(R, 4)`` grown about their centres, so that ``context`` of ``size`` pixels lie around each.

    Args:
        boxes: ``(R, 4)`` xyxy.
        size: of the frame that the grown box fills.
        context: pixels of the frame on each side that are not the box.
    """
    grow = (boxes[:, 2:] - boxes[:, :2]) * (context / (size - 2 * context))  # (R, 2)
    return torch.cat([boxes[:, :2] - grow, boxes[:, 2:] + grow], dim=1)  # (R, 4)
