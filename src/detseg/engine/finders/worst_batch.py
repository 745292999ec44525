"""The batch that needs the most memory: as large as the recipe makes images, as full as the fullest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from detseg.data.module import DetectionData
from detseg.data.sample import Sample, SampleDataset, collate
from detseg.data.split import TransformedSplit
from detseg.structures import Batch, SemanticMap, Target

DRAWS = 4
"""Times that the recipe is applied to an image, as its scale and crop are random."""


@dataclass(frozen=True)
class Worst:
    """What a batch is made of.

    Attributes:
        size: (height, width) in pixels: the largest of each, since a batch is padded to both.
        target: that of the fullest image.
        images: how many images were looked at.
    """

    size: tuple[int, int]
    target: Target
    images: int

    def save(self, path: Path) -> Path:
        """Write it as plain tensors and return the path."""
        semantic = self.target.semantic
        plain = {
            "size": self.size,
            "own_size": self.target.size,
            "images": self.images,
            "boxes": self.target.boxes.as_subclass(Tensor),
            "labels": self.target.labels.as_subclass(Tensor),
            "masks": None if self.target.masks is None else self.target.masks.as_subclass(Tensor),
            "semantic": None if semantic is None else semantic.labels.as_subclass(Tensor),
            "ignore_index": None if semantic is None else semantic.ignore_index,
        }
        torch.save(plain, path)
        return path


def read_worst(path: Path) -> Worst:
    """Read what ``Worst.save`` wrote."""
    plain: dict[str, Any] = torch.load(path, weights_only=True)
    labels = plain["semantic"]
    semantic = None if labels is None else SemanticMap(labels, ignore_index=plain["ignore_index"])
    own = tuple(plain["own_size"])
    target = Target(
        boxes=plain["boxes"], labels=plain["labels"], masks=plain["masks"], semantic=semantic, size=(own[0], own[1])
    )
    return Worst((plain["size"][0], plain["size"][1]), target, plain["images"])


def find_worst(data: DetectionData, *, scan: int | None = 2000) -> Worst:
    """Look through the training split for the largest image, after the recipe, and the fullest one.

    Args:
        data: its ``dataset("train")`` and ``train_transform`` are used.
        scan: how many images at most, evenly spread; ``None``: all. Where the sizes are known without reading the
            images, one of each size and the fullest ones are looked at.
    """
    samples = data.dataset("train")
    split = TransformedSplit(samples=samples, transform=data.train_transform, seed=data.seed)
    size, fullest, looked = (1, 1), None, _candidates(samples, scan)
    for place, index in enumerate(looked):
        for draw in range(DRAWS if data.train_transform is not None else 1):
            image, target, _ = split[draw, index, place]  # a batch of its own, as the recipe may draw a size for each
            size = max(size[0], image.shape[-2]), max(size[1], image.shape[-1])
            if fullest is None or len(target) > len(fullest):
                fullest = replace(target, size=(image.shape[-2], image.shape[-1]))
    assert fullest is not None  # a data module refuses empty splits
    return Worst(size, fullest, len(looked))


def _candidates(samples: SampleDataset, scan: int | None) -> list[int]:
    """Return rows worth looking at."""
    limit = len(samples) if scan is None else min(scan, len(samples))
    store = getattr(samples, "store", None)
    if store is None:
        return [int(row) for row in np.unique(np.linspace(0, len(samples) - 1, limit).round())]
    _, first = np.unique(np.asarray(store.sizes), axis=0, return_index=True)
    fullest = np.argsort(-np.diff(store.offsets), kind="stable")[:8]
    return sorted({*first.tolist()[:limit], *fullest.tolist()})


def batch_of(worst: Worst, images: int, *, size_divisor: int = 32, proposals: int | None = None) -> Batch:
    """Return a batch of ``images`` times the worst image, filled with noise.

    Args:
        worst: the image.
        images: how often.
        size_divisor: sides are padded to multiples of this many pixels.
        proposals: boxes drawn at random for each image; ``None``: its batches have no proposals.
    """
    height, width = worst.size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    target = _stretched(worst.target, worst.size)
    if proposals is not None:
        corners = torch.rand((proposals, 2, 2), generator=generator).sort(dim=1).values  # (P, corner, axis)
        target = replace(target, proposals=corners.flatten(1) * torch.tensor([width, height] * 2))
    sample = Sample(noise, target)
    return collate([sample] * images, size_divisor=size_divisor)


def _stretched(target: Target, size: tuple[int, int]) -> Target:
    """Return the target as of an image of another size."""
    height, width = target.size if target.size != (0, 0) else size
    factors = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=target.boxes.dtype)
    masks, semantic = target.masks, target.semantic
    return replace(
        target,
        boxes=target.boxes.as_subclass(Tensor) * factors,  # (N, 4)
        area=target.area * factors[0] * factors[1],
        masks=None if masks is None else _resized(masks, size).bool(),
        semantic=None
        if semantic is None
        else replace(semantic, labels=_resized(semantic.labels[None], size)[0].long()),
        panoptic=None,
        size=size,
    )


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps ``(N, H, W)`` at another size, by the nearest pixel."""
    if len(maps) == 0:
        return maps.new_zeros((0, *size))
    return F.interpolate(maps[None].float(), size=tuple(size), mode="nearest")[0]


class WorstData(DetectionData):
    """Gives the same worst batch over and over.

    Args:
        worst: what it is made of.
        batch_size: images per batch.
        size_divisor: as the run's own data have it.
        batches: how many, per epoch.
        proposals: boxes drawn at random for each image, for a model that is given its proposals; ``None`` otherwise.
    """

    def __init__(
        self,
        *,
        worst: Worst,
        batch_size: int,
        size_divisor: int = 32,
        batches: int = 2,
        proposals: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, size_divisor=size_divisor, num_workers=0)
        self.worst, self.batches, self.proposals = worst, batches, proposals

    def setup(self, stage: str | None = None) -> None:
        """Read nothing."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches, ready made."""
        batch = batch_of(self.worst, self.batch_size, size_divisor=self.size_divisor, proposals=self.proposals)
        return DataLoader([batch] * self.batches, batch_size=None)  # type: ignore[arg-type]  # a list will do
