"""Detections and objects of many images as flat arrays, and the metric that collects them.

Letters: I images, N detections, G objects, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from detseg.metrics.base import Array, RowMetric
from detseg.structures import Detections, Target


@dataclass(frozen=True)
class Rows:
    """Fields that share their first dimension."""

    def take(self, index: Array) -> Self:
        """Return the chosen rows of every field."""
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class Found(Rows):
    """Detections of many images.

    Attributes:
        image: ``(N,)`` int64, place of the image in ascending order of image ids.
        label: ``(N,)`` int64, 0..K-1.
        score: ``(N,)`` float64.
        area: ``(N,)`` float64, square pixels; of the mask where masks count, else of the box.
        box: ``(N, 4)`` float64 xyxy, or ``(N, 0)`` where masks count.
    """

    image: Array
    label: Array
    score: Array
    area: Array
    box: Array


@dataclass(frozen=True)
class Truth(Rows):
    """Objects of many images.

    Attributes:
        image: ``(G,)`` int64, as in ``Found``.
        label: ``(G,)`` int64.
        crowd: ``(G,)`` bool.
        difficult: ``(G,)`` bool.
        area: ``(G,)`` float64, the data set's figure.
        box: ``(G, 4)`` float64 xyxy, or ``(G, 0)`` where masks count.
    """

    image: Array
    label: Array
    crowd: Array
    difficult: Array
    area: Array
    box: Array


class SceneMetric(RowMetric):
    """A metric over whole epochs of detections: collects rows, and hands them over sorted by image id.

    The order matters where scores tie: sorted by image id, the figures do not depend on how images were shared out.
    Every image must come once, however many ranks there are.
    """

    def __init__(self, *, num_classes: int | None, class_names: Sequence[str] | None) -> None:
        super().__init__()
        self.num_classes = class_count(num_classes, class_names)
        self.class_names = None if class_names is None else list(class_names)
        self.add_rows("images", 3, torch.int64)  # id, detections, objects
        self.add_rows("found", 7)  # label, score, area, box
        self.add_rows("truth", 8)  # label, crowd, difficult, area, box

    def keep_scene(self, detections: list[Detections], targets: list[Target], areas: list[Tensor] | None) -> None:
        """Append the rows of a batch.

        Args:
            detections: one per image.
            targets: one per image.
            areas: ``(n,)`` per image, the detections' areas; ``None``: those of their boxes.
        """
        check_batch(detections, targets, self.num_classes)
        if not targets:
            return
        ids = [[target.image_id, len(found), len(target)] for found, target in zip(detections, targets, strict=True)]
        self.keep("images", torch.tensor(ids))
        box = _flat(detections, "boxes")  # (N, 4)
        size = box[:, 2:] - box[:, :2]
        area = size[:, 0] * size[:, 1] if areas is None else torch.cat([area.cpu() for area in areas]).double()
        score, label = _flat(detections, "scores"), _flat(detections, "labels")
        self.keep("found", torch.cat([torch.stack([label, score, area], dim=1), box], dim=1))
        columns = [_flat(targets, name) for name in ("labels", "iscrowd", "difficult", "area")]  # 4 of (G,)
        self.keep("truth", torch.cat([torch.stack(columns, dim=1), _flat(targets, "boxes")], dim=1))

    def scene(self) -> tuple[Found, Truth, Array]:
        """Return all rows sorted by image id, and the ids ``(I,)`` ascending.

        Raises:
            ValueError: an image id came twice.
        """
        images = self.rows("images")
        check_unique(images[:, 0])
        arrival = np.argsort(images[:, 0], kind="stable")
        place = np.empty(len(images), dtype=np.int64)
        place[arrival] = np.arange(len(images))
        image, truth_image = np.repeat(place, images[:, 1]), np.repeat(place, images[:, 2])
        found, truth = self.rows("found"), self.rows("truth")
        flat = Found(
            image=image, label=found[:, 0].astype(np.int64), score=found[:, 1], area=found[:, 2], box=found[:, 3:]
        )
        objects = Truth(
            image=truth_image,
            label=truth[:, 0].astype(np.int64),
            crowd=truth[:, 1] > 0,
            difficult=truth[:, 2] > 0,
            area=truth[:, 3],
            box=truth[:, 4:],
        )
        if (arrival[:-1] < arrival[1:]).all():
            return flat, objects, images[:, 0]
        by_image, truth_by_image = np.argsort(image, kind="stable"), np.argsort(truth_image, kind="stable")
        return flat.take(by_image), objects.take(truth_by_image), images[arrival, 0]

    def classes(self, found: Found, truth: Truth) -> int:
        """Return the number of classes: as given, or as many as the labels need."""
        if self.num_classes is not None:
            return self.num_classes
        return 1 + int(max(found.label.max(initial=-1), truth.label.max(initial=-1)))


def class_count(num_classes: int | None, class_names: Sequence[str] | None) -> int | None:
    """Return the number of classes, or ``None`` where neither argument tells it.

    Raises:
        ValueError: the two disagree.
    """
    if class_names is None:
        return num_classes
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(
            f"num_classes is {num_classes}, but there are {len(class_names)} class names: {list(class_names)}"
        )
    return len(class_names)


def check_unique(image_ids: Array) -> None:
    """Raise ``ValueError`` where an image id ``(I,)`` occurs twice."""
    ids, number = np.unique(image_ids, return_counts=True)
    if (number > 1).any():
        twice = ids[number > 1]
        raise ValueError(
            f"{len(twice)} image ids came more than once, first {int(twice[0])} ({int(number.max())} times at most): "
            "give every Target its own image_id, call reset() between epochs, and use an unpadded sampler under DDP"
        )


def check_batch(detections: list[Detections], targets: list[Target], num_classes: int | None) -> None:
    """Raise ``ValueError`` naming the image unless every number can be counted.

    Looked at here although the structures check themselves: those look at tensors in host memory alone.

    Args:
        detections: one per image.
        targets: one per image.
        num_classes: labels must lie below it; ``None``: any label that is not negative.
    """
    if len(detections) != len(targets):
        raise ValueError(f"there are detections of {len(detections)} images, but targets of {len(targets)}")
    if not targets:
        return
    limit = torch.iinfo(torch.int64).max if num_classes is None else num_classes
    allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
    for what, rows, finite in (
        ("detection", detections, ("boxes", "scores")),
        ("object", targets, ("boxes", "area")),
    ):
        labels = torch.cat([row.labels for row in rows]).cpu()
        _blame(targets, rows, what, "label", labels, (labels >= 0) & (labels < limit), f"must be {allowed}")
        for name in finite:
            values = torch.cat([getattr(row, name).detach().flatten() for row in rows]).cpu()
            _blame(targets, rows, what, name, values, values.isfinite(), "must be finite")


def _blame(
    targets: list[Target],
    rows: Sequence[Detections | Target],
    what: str,
    name: str,
    values: Tensor,
    good: Tensor,
    rule: str,
) -> None:
    """Raise for the first value that is not good, naming its image and its row."""
    if bool(good.all()):
        return
    at = int((~good).nonzero()[0, 0])
    width = 4 if name == "boxes" else 1
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) * width
    image = int(torch.searchsorted(ends, at, right=True))
    row = (at - (int(ends[image - 1]) if image else 0)) // width
    target = targets[image]
    where = f"image {target.image_id}" + (f" ({target.file})" if target.file else "")
    raise ValueError(f"{where}: {what} {row} has {name} {values[at].item()}, which {rule}")


def _flat(structures: Sequence[Detections | Target], name: str) -> Tensor:
    """Return one field of all images as float64 in host memory: ``(n,)`` or ``(n, 4)``."""
    return torch.cat([getattr(structure, name).detach() for structure in structures]).cpu().double()
