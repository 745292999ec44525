"""YOLO text files: ``data.yaml``, and a text file per image with a line per object.

A line is ``class x y width height`` (centre and size) or ``class x1 y1 x2 y2 x3 y3 ...`` (a polygon), all divided by
the image's width and height. A label file lies where the image lies, with the last ``/images/`` of its path turned
into ``/labels/`` and the ending into ``.txt``; an image without one has no objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError, both_lists
from detseg.data.files import AUTO, FileData, below, read_text, upright_size
from detseg.data.image import SUFFIXES


class Yolo(FileData):
    """A data set that a ``data.yaml`` describes.

    The file has ``path``, ``names`` (list, or number -> name), ``nc``, and for ``train``, ``val`` and ``test`` a folder
    of images, a text file that lists them, or several of these.

    Args:
        root: folder of the data set.
        file: the YAML file below the root. Its ``path`` is relative to its own folder; a split's folder may be given as
            ``../train/images`` although it is ``train/images``, as some exports have it.
        train: key of the training split in the file; ``None`` where there is none.
        val: key of the validation split.
        test: key of the test split.
        drop_empty, cache_images and what follows: see :class:`~detseg.data.files.FileData`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        file: str = "data.yaml",
        train: str | None = "train",
        val: str | None = "val",
        test: str | None = None,
        drop_empty: bool = False,
        cache_images: bool | str = AUTO,
        truth: str = "boxes",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        size_divisor: int = 32,
        seed: int = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            root=root,
            train=train,
            val=val,
            test=test,
            drop_empty=drop_empty,
            cache_images=cache_images,
            truth=truth,
            num_classes=num_classes,
            class_names=class_names,
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
        self.file = self.root / file

    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the YAML file and the label files, and the folders of the images."""
        images = self._images(split)
        return [self.file, *map(label_path, images)], sorted({image.parent for image in images})

    def scan(self, split: str) -> StoreBuilder:
        """Read the label files of ``split``."""
        names = _names(self.file, self._content())
        builder = StoreBuilder(
            source=f"{self.file} {split}", categories=names, wanted=self.wanted_objects, need_masks=self.need_masks
        )
        for number, image in enumerate(self._images(split)):
            if not image.is_file():
                builder.report.add("missing_image", str(image))
                continue
            size = upright_size(image, None, builder.report)
            file = below(self.root, image)
            row, labels = builder.add_image(file, number, size), label_path(image)
            for item in _read_labels(labels, row, size, sorted(names), builder) if labels.is_file() else ():
                builder.add(item)
        return builder

    def _content(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(read_text(self.file))
        except FileNotFoundError as error:
            raise DataError(f"{self.file}: no such file; set data.root and data.file") from error
        except yaml.YAMLError as error:
            raise DataError(f"{self.file}: not YAML ({error})") from error
        if not isinstance(content, dict):
            raise DataError(f"{self.file}: must hold keys such as train, val and names, got {type(content).__name__}")
        return content

    def _images(self, split: str) -> list[Path]:
        """Return the image files of ``split`` in order; those of a text list may be missing."""
        content, key = self._content(), self.split_names[split]
        entries = content.get(key)
        if not entries:
            raise DataError(
                f"{self.file}: no key {key!r} for split {split}; it has {list(content)}. "
                f"Set data.{split}, to null where there is no such split"
            )
        base = self.file.parent / str(content.get("path") or "")
        found: list[Path] = []
        for entry in entries if isinstance(entries, list) else [entries]:
            place = next((path for path in _candidates(base, str(entry)) if path.exists()), None)
            if place is None:
                raise DataError(f"{self.file}: {key}: {entry} is neither a folder nor a list below {base}")
            found += _listed(place) if place.is_file() else _inside(place)
        return found


def label_path(image: Path) -> Path:
    """Return where the labels of ``image`` lie: the last folder ``images`` of its path becomes ``labels``."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _candidates(base: Path, entry: str) -> list[Path]:
    entry = entry.replace("\\", "/")  # as Windows programs write it
    return [base / entry, base / entry.removeprefix("../")]


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _listed(file: Path) -> list[Path]:
    lines = [line.strip() for line in read_text(file).replace("\\", "/").splitlines()]
    return [file.parent / line for line in lines if line]  # an absolute path stays as it is


def _names(file: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """Return number -> name and check it against ``nc``."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{file}: names must be a list of class names, or number: name, got {names!r}")
    if not all(isinstance(number, int) for number in names):
        raise DataError(f"{file}: names must be a list of class names, or number: name, got {names!r}")
    found = {number: str(name) for number, name in sorted(names.items())}
    if content.get("nc") is not None and str(content["nc"]) != str(len(found)):
        raise DataError(f"{file}: nc is {content['nc']}, but there are {len(found)} names: {list(found.values())}")
    return found


def _read_labels(
    file: Path, row: int, size: tuple[int, int], numbers: list[int], builder: StoreBuilder
) -> Iterable[RawObject]:
    seen: set[str] = set()
    for place, line in enumerate(read_text(file).splitlines(), start=1):
        fields, where = line.split(), f"line {place} of {file.name}"
        if not fields:
            continue
        if line.strip() in seen:
            builder.report.add("duplicate", where)
            continue
        seen.add(line.strip())
        try:
            category, *values = (float(field) for field in fields)
        except ValueError as error:
            raise DataError(
                f"{file}:{place}: {error}; a line holds numbers alone, got {line.strip()[:80]!r}"
            ) from error
        if category not in numbers:
            raise DataError(
                f"{file}:{place}: class {fields[0]} is out of range; allowed are {numbers[0]}..{numbers[-1]}. "
                f"{both_lists(builder.wanted, builder.found_names)}"
            )
        yield _object(file, place, row, int(category), values, size)


def _object(file: Path, place: int, row: int, category: int, values: list[float], size: tuple[int, int]) -> RawObject:
    height, width = size
    item = RawObject(row, None, category, f"line {place} of {file.name}")
    if len(values) == 4:
        x, y, w, h = values
        item.box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    elif len(values) >= 6 and len(values) % 2 == 0:
        item.rings = [[value * (height if odd % 2 else width) for odd, value in enumerate(values)]]
    else:
        raise DataError(
            f"{file}:{place}: {len(values)} numbers after the class; allowed are 4 (x y width height) or "
            "an even number from 6 on (a polygon)"
        )
    return item
