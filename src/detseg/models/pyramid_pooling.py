"""Spatial pyramid pooling of regions.

He, Zhang, Ren and Sun, 2014, `"Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
<https://arxiv.org/abs/1406.4729>`_, section 4.1.

A region of the feature map is cut into 1 x 1, 2 x 2, 3 x 3 and 6 x 6 bins; the maximum of each goes into one vector of
fixed length, however large the region. One level of this pyramid is Fast R-CNN's RoIPool, by which it is computed.
Differs: a bin's borders are rounded as Fast R-CNN rounds them (to the nearest cell), where the paper's appendix A takes
the cells that lie wholly inside the region.

Letters: R regions of all images, C channels, n bins of a level's side, D = C * (sum of n * n).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detseg.models.region_features import RegionFeatures
from detseg.ops.roi_pool import roi_pool


class PyramidPooling(RegionFeatures):
    """Pool every region of one feature map into bins of several sizes.

    Args:
        bins: n of each level; (6, 3, 2, 1) are the paper's 50 bins.

    Raises:
        ValueError: there are no levels, or one has no bins.
    """

    def __init__(self, *, bins: Sequence[int] = (6, 3, 2, 1)) -> None:
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(
                f"PyramidPooling: bins is {list(bins)}; give at least one level, each of 1 bin a side or more"
            )
        self.bins = [int(count) for count in bins]

    def shape(self, channels: int) -> tuple[int, ...]:
        """Return (D,)."""
        return (channels * sum(count * count for count in self.bins),)

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return ``(R, D)``, level by level, each as ``(C, n, n)`` flattened; see ``RegionFeatures``.

        Raises:
            ValueError: there is more than one map; the paper knows no pyramid of maps.
        """
        if len(features) != 1:
            raise ValueError(
                f"PyramidPooling reads one map, but the backbone gives {len(features)}; set its strides to one, such "
                "as [16]"
            )
        level, regions = features[0].float(), regions.float()  # half precision is off by whole pixels
        pooled = [roi_pool(level, regions, 1.0 / strides[0], output_size=count) for count in self.bins]
        return torch.cat([part.flatten(1) for part in pooled], dim=1)  # (R, D)
