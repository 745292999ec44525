"""Iterative deep aggregation: Yu, Wang, Shelhamer and Darrell, Deep Layer Aggregation, 2018, arXiv:1707.06484.

Section 4.2 and figure 4, in the form that CenterNet has on DLA-34 (Zhou et al. 2019, arXiv:1904.07850, figure 6): the
coarsest maps are merged into the next finer one first, so that the merged maps are merged again on every finer level,
and in the end the results of all levels but the coarsest are merged at the finest.

Differs: up-sampling is bilinear and stays so, where the published code learns it from that start, one weight per
channel and cell; levels may be given widths of their own; a map that comes out larger than the finer one is cut, so
that any image size fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from detseg.nn.backbone import Backbone
from detseg.nn.deformable import convolution_block


class Aggregation(nn.Module):
    """Merge maps one after the other into the finest: project, up-sample, add the one before, and convolve.

    Args:
        widths: channels of the maps, finest first; all results have the first one's.
        factors: cells of the first map per cell of each other one, along both axes.
        deformable: of all convolutions.
    """

    def __init__(self, *, widths: Sequence[int], factors: Sequence[int], deformable: bool) -> None:
        super().__init__()
        width = widths[0]
        self.factors = list(factors)
        self.projections = nn.ModuleList(convolution_block(w, width, deformable=deformable) for w in widths[1:])
        self.nodes = nn.ModuleList(convolution_block(width, width, deformable=deformable) for _ in widths[1:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return all maps but the first, ``(B, widths[0], H, W)`` each, merged at the size of the first."""
        merged = [maps[0]]
        height, width = maps[0].shape[2:]
        parts = zip(maps[1:], self.factors, self.projections, self.nodes, strict=True)
        for level, factor, projection, node in parts:
            large = F.interpolate(projection(level), scale_factor=float(factor), mode="bilinear")  # (B, C, >= H, >= W)
            merged.append(node(large[:, :, :height, :width] + merged[-1]))
        return merged[1:]


class DeepAggregation(Backbone):
    """A backbone whose maps are aggregated into one at the finest stride.

    Args:
        backbone: gives the maps, finest first; registered as ``body``.
        widths: channels of each level while it is merged; ``None`` takes the backbone's own, as the paper does.
        deformable: of all convolutions, as in CenterNet; slow on a CPU.

    Raises:
        ValueError: the backbone gives a single map, or there is not one width per map.
    """

    def __init__(self, *, backbone: Backbone, widths: Sequence[int] | None = None, deformable: bool = False) -> None:
        super().__init__()
        own = list(backbone.channels)
        widths = own if widths is None else list(widths)
        if len(own) < 2 or len(widths) != len(own):
            raise ValueError(
                f"DeepAggregation: the backbone gives maps of strides {backbone.strides} and widths is {widths}; it "
                "needs two maps or more, and one width for each"
            )
        self.body = backbone
        self.laterals = nn.ModuleList(_lateral(before, after) for before, after in zip(own, widths, strict=True))
        strides, rounds = backbone.strides, []
        for level in range(len(own) - 2, -1, -1):  # all coarser maps have been brought to the next level by then
            count = len(own) - 1 - level
            inner, factors = (
                [widths[level]] + [widths[level + 1]] * count,
                [strides[level + 1] // strides[level]] * count,
            )
            rounds.append(Aggregation(widths=inner, factors=factors, deformable=deformable))
        self.rounds = nn.ModuleList(rounds)
        factors = [stride // strides[0] for stride in strides[1:-1]]
        self.final = Aggregation(widths=widths[:-1], factors=factors, deformable=deformable)
        self.channels, self.strides = [widths[0]], [strides[0]]
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map ``(B, widths[0], ceil(H / stride), ceil(W / stride))``."""
        maps = [lateral(level) for lateral, level in zip(self.laterals, self.body(images), strict=True)]
        results: list[Tensor] = []  # of every level but the coarsest, finest first
        merged = [maps[-1]]
        for level, aggregation in zip(reversed(maps[:-1]), self.rounds, strict=True):
            merged = [level, *aggregation([level, *merged])]  # (B, widths of the level, H / s, W / s) each
            results.insert(0, merged[-1])
        return [results[0], *self.final(results)][-1:]


def _lateral(before: int, after: int) -> nn.Module:
    """Return what brings a map of the body to its width: nothing where it has it."""
    if before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
