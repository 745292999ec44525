"""Images whose objects carry unique labels, from which everything else about them can be told, drawn from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from detseg.data import DetectionData
from detseg.data.augment import Augment, Context
from detseg.data.sample import Sample, SampleDataset
from detseg.data.transforms import DetectionTrain
from detseg.structures import SemanticMap, Target

SIZES = ((48, 64), (64, 40), (5, 7), (40, 40), (33, 90), (1, 1), (56, 56))
"""(height, width) of the images, over and over; the fourth of each seven has no objects."""
PER_IMAGE = 6
BLACK = 8
"""Pixels darker than this belong to no object; fill is grey."""


def colour(label: int) -> tuple[int, int, int]:
    """Return the RGB of an object, far from other objects' and from the background."""
    return 60 + label * 37 % 180, 60 + label * 71 % 180, 60 + label * 113 % 180


def crowd(labels: Tensor) -> Tensor:
    return labels % 5 == 4


def difficult(labels: Tensor) -> Tensor:
    return labels % 3 == 1


class Planted(SampleDataset):
    """Rectangles and ellipses on black, beside each other: nothing of them is so thin that resizing could lose it.

    Args:
        count: number of images.
        masks: give instance masks.
        proposals: give each object's box, and one more, as proposals.
        semantic: give a map of labels.
    """

    def __init__(self, count: int = 14, *, masks: bool = True, proposals: bool = False, semantic: bool = False) -> None:
        self.count, self.masks, self.proposals, self.semantic = count, masks, proposals, semantic
        self.class_names = [str(label) for label in range(count * PER_IMAGE)]
        self.category_ids = list(range(count * PER_IMAGE))
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def _draw(self, index: int) -> Sample:
        height, width = SIZES[index % len(SIZES)]
        rng = np.random.default_rng(index)
        image = torch.zeros((3, height, width), dtype=torch.uint8)
        owner = torch.full((height, width), -1)
        for number in range(0 if index % len(SIZES) == 3 or min(height, width) < 4 else PER_IMAGE):
            label = index * PER_IMAGE + number
            tries = (_shape(rng, height, width, ellipse=number % 2 == 1) for _ in range(8))
            inside = next((shape for shape in tries if not bool((owner[shape] >= 0).any())), None)
            if inside is None:
                continue
            owner[inside] = label
            image[:, inside] = torch.tensor(colour(label), dtype=torch.uint8)[:, None]
        labels = torch.unique(owner)
        labels = labels[labels >= 0]
        masks = owner[None] == labels[:, None, None]  # (N, H, W)
        boxes = torch.stack([_box(mask) for mask in masks]) if len(masks) else torch.zeros((0, 4))
        target = Target(
            boxes=boxes, labels=labels, masks=masks if self.masks else None, iscrowd=crowd(labels),
            difficult=difficult(labels), area=masks.flatten(1).sum(dim=1).float(), image_id=index,
            size=(height, width), file=f"planted/{index}",
            proposals=torch.cat([boxes, torch.tensor([[0.0, 0, width, height]])]) if self.proposals else None,
            semantic=SemanticMap(torch.where(owner < 0, 0, owner + 1)) if self.semantic else None,
        )  # fmt: skip
        return Sample(image, target)


def _shape(rng: np.random.Generator, height: int, width: int, *, ellipse: bool) -> Tensor:
    h, w = (int(rng.integers(min(8, side // 2), max(9, side // 2))) for side in (height, width))
    h, w = min(h, height), min(w, width)
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    if not ellipse:
        return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
    down, right = (rows + 0.5 - top - h / 2) / (h / 2), (columns + 0.5 - left - w / 2) / (w / 2)
    return down**2 + right**2 <= 1


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


class PlantedData(DetectionData):
    """The training split of these; ``splits`` has a validation split of two."""

    splits = ("train", "val")

    def __init__(self, *, count: int = 14, **options: Any) -> None:
        super().__init__(**{"batch_size": 2, "num_workers": 0, "seed": 3, "truth": "instances"} | options)
        self.count = count

    def read(self, split: str) -> Planted:
        planted = Planted(self.count, masks=self.truth == "instances", semantic=self.truth == "semantic")
        planted.count = self.count if split == "train" else 2
        return planted


def context(samples: SampleDataset, **place: Any) -> Context:
    """Return the context of a sample among others."""
    return Context(images=len(samples), read=lambda other: samples[other][:2], **place)


def everything(**options: Any) -> DetectionTrain:
    """Return a recipe with all that there is."""
    augment = Augment(
        **{"photometric": 0.5, "zoom_out": 0.5, "iou_crop": 0.5, "mosaic": 0.5, "mixup": 0.3, "copy_paste": 0.5,
           "multi_scale": [0.75, 1.0, 1.25], "multi_scale_every": 1} | options,
    )  # fmt: skip
    return DetectionTrain(size=(32, 48), scale=(0.5, 1.5), vertical_flip=0.5, augment=augment)
