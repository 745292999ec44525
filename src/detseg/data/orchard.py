"""Orchard, the embedded dataset: apples, pears and oranges on grass under a sky, drawn from a seed.

One scene gives four truths: boxes, instance masks, a semantic map and a panoptic map. Boxes and masks are of the
visible pixels, as in COCO; stem and leaf belong to their fruit. Image i of a split is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from detseg.data.module import DetectionData
from detseg.data.orchard_draw import Scene, draw_scene
from detseg.data.orchard_fruit import SPECIES
from detseg.data.sample import Sample, SampleDataset
from detseg.structures import PanopticMap, SemanticMap, Target

SPLITS = ("train", "val", "test")
STUFF = ("sky", "grass")
TRUTHS = ("boxes", "instances", "semantic", "panoptic")


class OrchardDataset(SampleDataset):
    """One split of Orchard.

    Args:
        split: train, val or test; splits share no scene.
        images: how many images; a longer split begins with the images of a shorter one.
        image_size: (height, width) in pixels, or one number for a square.
        truth: what ``target`` holds besides boxes and labels (0 apple, 1 pear, 2 orange): ``boxes`` nothing,
            ``instances`` masks, ``semantic`` the map (0 sky, 1 grass, 2 apple, 3 pear, 4 orange), ``panoptic`` all of
            these and the panoptic map.
        seed: another seed is another orchard.
        cache_mb: megabytes of drawn images that each process keeps, as every epoch shows them again; 0 keeps none.

    Raises:
        ValueError: an unknown split or truth, no images, or an image side below 16 pixels.
    """

    def __init__(
        self,
        *,
        split: str,
        images: int,
        image_size: int | Sequence[int] = 128,
        truth: str = "boxes",
        seed: int = 0,
        cache_mb: float = 256,
    ) -> None:
        self.size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if split not in SPLITS:
            raise ValueError(f"Orchard: split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        if truth not in TRUTHS:
            raise ValueError(f"Orchard: truth {truth!r} is unknown; choose one of {', '.join(TRUTHS)}")
        if images < 1 or min(self.size) < 16 or seed < 0:
            raise ValueError(
                f"Orchard: images={images}, image_size={self.size}, seed={seed}; "
                "give at least 1 image, sides of at least 16 px and a seed of at least 0"
            )
        self.split, self.images, self.truth, self.seed = split, images, truth, seed
        self.class_names = [*STUFF, *SPECIES] if truth == "semantic" else list(SPECIES)
        self.category_ids = list(range(len(STUFF) + len(SPECIES))) if truth == "semantic" else [2, 3, 4]
        self._room = int(cache_mb * 1e6 / (5 * self.size[0] * self.size[1]))  # 5 bytes a pixel: RGB, segment, class
        self._cache: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self.images

    def scene(self, index: int) -> Scene:
        """Return the drawn scene and its maps as numpy arrays; do not write into them."""
        if not 0 <= index < self.images:
            raise IndexError(f"Orchard {self.split} has images 0..{self.images - 1}, not {index}")
        scene = self._cache.get(index)
        if scene is None:
            scene = draw_scene(seed=self.seed, split=SPLITS.index(self.split), index=index, size=self.size)
            if len(self._cache) < self._room:
                self._cache[index] = scene
        return scene

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        image = tv_tensors.Image(torch.from_numpy(scene.image.copy()))  # (3, H, W); the cache stays untouched
        return Sample(image=image, target=self.target(index))

    def target(self, index: int) -> Target:
        """Return the truth about one image; ``image_id`` is the index."""
        scene = self.scene(index)
        masks = scene.segments[None] == np.arange(1, len(scene.labels) + 1, dtype=np.uint8)[:, None, None]  # (N, H, W)
        semantic = SemanticMap(torch.from_numpy(scene.semantic.astype(np.int64)))
        return Target(
            boxes=_boxes(masks),
            labels=torch.from_numpy(scene.labels.copy()),
            masks=torch.from_numpy(masks) if self.truth in ("instances", "panoptic") else None,
            area=torch.from_numpy(masks.sum(axis=(1, 2), dtype=np.float32)),
            image_id=index,
            size=self.size,
            semantic=semantic if self.truth in ("semantic", "panoptic") else None,
            panoptic=_panoptic(scene) if self.truth == "panoptic" else None,
            file=f"orchard/{self.split}/{index}",
        )


class Orchard(DetectionData):
    """The embedded dataset as a LightningDataModule; see the module's head and ``OrchardDataset``.

    ``truth="semantic"`` has the 5 classes sky, grass, apple, pear, orange; otherwise there are the 3 fruits.

    Args:
        image_size: (height, width) in pixels, or one number for a square; fruit grows with the shorter side.
        train_images: images in the training split.
        val_images: images in the validation split.
        test_images: images in the test split.
        seed: of the scenes and of the order in which they are shown.
        cache_mb: megabytes of drawn images that each process keeps per split.
        truth: ``boxes``, ``instances`` or ``semantic``.
        num_classes: checked against the classes above; ``None`` takes them.
        train_transform: recipe applied to training samples.
        eval_transform: recipe applied to validation and test samples.
        batch_size: images per training step.
        eval_batch_size: images per evaluation step; ``None`` takes ``batch_size``.
        num_workers: processes that draw images; 0 draws in the main process.
        size_divisor: batches are padded to a multiple of this, in pixels.
        drop_last: leave out a last, smaller training batch.
        pin_memory: page-locked batches, which copy faster to a GPU; ``None``: where there is one.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 128,
        train_images: int = 800,
        val_images: int = 200,
        test_images: int = 200,
        seed: int = 0,
        cache_mb: float = 256,
        truth: str = "boxes",
        num_classes: int | None = None,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        size_divisor: int = 32,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            truth=truth,
            num_classes=num_classes,
            train_transform=train_transform,
            eval_transform=eval_transform,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            size_divisor=size_divisor,
            seed=seed,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        self.image_size = image_size
        self.images = {"train": train_images, "val": val_images, "test": test_images}
        self.cache_mb = cache_mb

    def read(self, split: str) -> OrchardDataset:
        """Return one split, drawn when it is looked at."""
        return OrchardDataset(
            split=split,
            images=self.images[split],
            image_size=self.image_size,
            truth=self.truth,
            seed=self.seed,
            cache_mb=self.cache_mb,
        )


def _boxes(masks: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
    """Return the boxes ``(N, 4)`` around masks ``(N, H, W)``: outer edges of the outermost pixels."""
    rows, columns = np.asarray(masks.any(axis=2)), np.asarray(masks.any(axis=1))  # (N, H), (N, W)
    if not len(masks):
        return torch.zeros((0, 4))
    height, width = masks.shape[1:]
    top, left = rows.argmax(axis=1), columns.argmax(axis=1)
    bottom, right = height - rows[:, ::-1].argmax(axis=1), width - columns[:, ::-1].argmax(axis=1)
    return torch.from_numpy(np.stack([left, top, right, bottom], axis=1).astype(np.float32))


def _panoptic(scene: Scene) -> PanopticMap:
    """Fruit are segments 1..N in the order of the labels; then sky and grass, if they show."""
    segments, labels = scene.segments.astype(np.int64), (scene.labels + len(STUFF)).tolist()
    things = len(labels)
    for stuff in range(len(STUFF)):
        pixels = scene.semantic == stuff
        if pixels.any():
            labels.append(stuff)
            segments[pixels] = len(labels)
    return PanopticMap(
        segments=torch.from_numpy(segments),
        labels=torch.tensor(labels, dtype=torch.int64),
        is_thing=torch.arange(len(labels)) < things,
    )
