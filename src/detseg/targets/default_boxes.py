"""SSD's targets: Liu et al., SSD: Single Shot MultiBox Detector, 2016, arXiv:1512.02325, section 2.2.

Built: the default boxes (equation 4 and what follows it) and their matching. As in torchvision, to whose numbers both
are equal bit by bit at the size that they are made for, the centres lie ``step`` pixels apart where the authors'
release has one, and of several objects whose best default box is the same the last takes it. Differs from the paper:
scales are listed per level, as their release does. Differs from torchvision: scales are shares of a fixed size, not of
whatever image comes, so that an object of so many pixels meets the same boxes in every image; only pairs that may match
are looked at; and an object that no default box touches makes none positive.

Letters: B images, G objects of all images, N default boxes of one image, L levels, A default boxes per cell, C pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detseg.targets.lattice import Lattice, Spacing, pick_best
from detseg.targets.matchers import BELOW
from detseg.targets.sparse import SparseIoUMatcher, paired_iou


class DefaultBoxes:
    """Boxes about the middle of every cell, of one scale per level and several shapes.

    A cell has a square of the level's scale, a square of the geometric mean of this and the next scale, and for every
    ratio r two boxes of the level's scale with width : height = r and 1 : r.

    Args:
        image_size: side in pixels of the image that the scales are shares of.
        scales: of each level and, one more, that of the level which would come next.
        ratios: per level, above 1.
        steps: per level, pixels between the centres; ``None`` spreads them evenly over the image (the paper's formula),
            as does a ``None`` for one level: for a level that lost cells at its borders.
        clip: no side is longer than ``image_size``.

    Raises:
        ValueError: the lists disagree in length, or a number is not positive.
    """

    def __init__(
        self,
        *,
        image_size: int,
        scales: Sequence[float],
        ratios: Sequence[Sequence[float]],
        steps: Sequence[float | None] | None = None,
        clip: bool = True,
    ) -> None:
        steps = [None] * len(ratios) if steps is None else list(steps)
        if not len(scales) - 1 == len(ratios) == len(steps) > 0:
            raise ValueError(
                f"DefaultBoxes: {len(scales)} scales, ratios for {len(ratios)} levels and {len(steps)} steps; each "
                "level needs one list of ratios and one step, and scales one number more"
            )
        given = [step for step in steps if step is not None]
        if min(image_size, *scales, *given, *(ratio for level in ratios for ratio in level)) <= 0:
            raise ValueError(
                f"DefaultBoxes: image_size {image_size}, scales {list(scales)}, ratios {list(map(list, ratios))} and "
                f"steps {steps} must be positive"
            )
        self.image_size = image_size
        self.scales = tuple(float(scale) for scale in scales)
        self.ratios = tuple(tuple(float(ratio) for ratio in level) for level in ratios)
        self.steps = tuple(steps)
        self.clip = clip

    def num_anchors(self) -> list[int]:
        """Return A, the default boxes per cell, of each level."""
        return [2 + 2 * len(level) for level in self.ratios]

    def strides(
        self, image_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], nominal: Sequence[int]
    ) -> list[Spacing]:
        """Return the pixels between the centres of each level: ``steps``, else side / cells; see ``References``."""
        return [
            (step, step) if step is not None else (image_size[0] / rows, image_size[1] / cols)
            for step, (rows, cols) in zip(self.steps, feature_sizes, strict=True)
        ]

    def __call__(
        self,
        feature_sizes: Sequence[tuple[int, int]],
        strides: Sequence[Spacing],
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """Return the default boxes of each level ``(H * W * A, 4)`` float32 xyxy pixels, by row, column, shape.

        Args:
            feature_sizes: (H, W) of each level.
            strides: of ``self.strides``.
            device: where they shall live.

        Raises:
            ValueError: the number of levels is not the one that the scales were given for.
        """
        if not len(feature_sizes) == len(strides) == len(self.ratios):
            raise ValueError(
                f"DefaultBoxes: ratios are given for {len(self.ratios)} levels, but the features have "
                f"{len(feature_sizes)} and the strides {len(strides)}; give one list of ratios per level"
            )
        levels = zip(feature_sizes, strides, range(len(self.ratios)), strict=True)
        return [self._level(size, stride, level).to(device) for size, stride, level in levels]

    def _level(self, size: tuple[int, int], stride: Spacing, level: int) -> Tensor:
        """Lay one level, in shares of the image first: torchvision rounds so, and ties of IoUs hang on the rounding."""
        y, x = (
            (torch.arange(cells) + 0.5) / (self.image_size / step) for cells, step in zip(size, stride, strict=True)
        )
        centre = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 1, 2)  # (H * W, 1, 2)
        half = 0.5 * self._sides(level)  # (A, 2)
        boxes = torch.cat([centre - half, centre + half], dim=-1) * self.image_size  # (H * W, A, 4)
        return boxes.reshape(-1, 4)

    def _sides(self, level: int) -> Tensor:
        """Return width and height of the shapes of a level ``(A, 2)``, as shares of the image."""
        scale, following = self.scales[level : level + 2]
        sides = [(scale, scale), (math.sqrt(scale * following),) * 2]
        for root in map(math.sqrt, self.ratios[level]):
            sides += [(scale * root, scale / root), (scale / root, scale * root)]
        return torch.tensor(sides).clamp(max=1.0 if self.clip else math.inf)

    def __repr__(self) -> str:
        return (
            f"DefaultBoxes(image_size={self.image_size}, scales={self.scales}, ratios={self.ratios}, "
            f"steps={self.steps}, clip={self.clip})"
        )


class MultiBoxMatcher:
    """Every object takes its best default box; each of the others learns the object that it overlaps most.

    Args:
        threshold: IoU from which a default box learns an object that did not take it; below it is background.

    Raises:
        ValueError: the threshold lies outside (0, 1].
    """

    def __init__(self, *, threshold: float = 0.5) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"MultiBoxMatcher: threshold is {threshold}; an IoU to match at lies in (0, 1]")
        self.threshold = threshold
        self._near = SparseIoUMatcher(positive=threshold, negative=threshold, allow_low_quality=True)

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Assign the objects of a batch.

        Args:
            boxes: ``(G, 4)`` xyxy pixels, of all images, those of one image side by side.
            image: ``(G,)`` int64 ascending, the image of each box.
            batch: the number B of images.
            lattice: the default boxes of one image.

        Returns:
            ``(B, N)`` int64: the row of the object among the G, or ``BELOW`` (-1) for background.
        """
        matched = boxes.new_full((batch * lattice.total,), BELOW, dtype=torch.int64)
        if len(boxes) == 0:
            return matched.view(batch, -1)
        found = self._near.candidates(boxes, image, lattice)
        # Anew from the boxes themselves, whose corners are no whole pixels: a shifted shape is rounded otherwise.
        iou = paired_iou(boxes[found.box], lattice.boxes[found.cell % lattice.total])  # (C,)
        near = (iou >= self.threshold).nonzero()[:, 0]
        wins = near[pick_best(found.cell[near], iou[near], found.box[near], len(matched))]
        matched[found.cell[wins]] = found.box[wins]
        best = pick_best(found.box, iou, found.cell, len(boxes)) & (iou > 0)  # (C,), one per object that touches any
        taken, owner = found.cell[best], found.box[best]  # (<= G,) each
        # Of several objects that take one box the last has it, in whatever order a device writes.
        matched[taken] = BELOW
        return matched.scatter_reduce_(0, taken, owner, "amax").view(batch, -1)

    def __repr__(self) -> str:
        return f"MultiBoxMatcher(threshold={self.threshold})"
