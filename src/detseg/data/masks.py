"""Folders of images with a map each: classes (semantic), or instance ids (boxes, instance masks, semantic).

Which class a value stands for is written down: as ``values`` such as ``{0: background, 255: person}``, as a list of the
classes of value 0, 1, 2 and so on, where 255 is ignored, or as ``class_names``, which are such a list. A value that is
not written down is an error: nothing is guessed from the data. A class that is written down keeps its label whether or
not a split shows it. 8-bit and 16-bit grey and palette files are read alike, by value.

Most data sets of semantic segmentation are such folders: conf/data has VOC 2012, Cityscapes, ADE20K, CamVid,
COCO-Stuff and Oxford-IIIT Pets as tables of values.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError
from detseg.data.files import AUTO, FileData, Pattern, below
from detseg.data.image import image_size
from detseg.data.maps import check_map, count_values, segments
from detseg.data.pairs import Pairs, find_pairs
from detseg.data.source import Source
from detseg.structures.maps import IGNORE_INDEX

log = logging.getLogger(__name__)

TELL_EVERY = 20.0
"""Seconds between two lines about a long check: COCO-Stuff's 118,287 maps take minutes once."""


class MaskFolder(FileData):
    """Images and maps that share their file names, up to endings.

    Args:
        root: folder of the data set.
        images: folder of the images below the root.
        masks: folder of the maps below the root; it may be the folder of the images, if ``mask_suffix`` is set.
        image_suffix: what an image's name has after the one that it shares with its map, such as ``_leftImg8bit``.
        mask_suffix: what a map's name has after the shared one, such as ``_inst``.
        lists: file below the root with the names of a split, see :func:`~detseg.data.pairs.read_names`; ``None``: all
            files of its folders.
        nested: whether the folders have folders within, the same for images and maps.
        holds: ``classes``: a value is a class; ``instances``: a value is one object, and 0 is none.
        values: value -> class name, or the list of them; several values may share a name, and ``null`` ignores the
            value. With ``instances`` and a divisor, the class of an object is ``values[value // instance_divisor]``.
        instance_divisor: with ``instances``: an object's value is class * divisor + number, as in Cityscapes (1000);
            values below the divisor are no objects. ``None``: all objects are of one class.
        download: let the sources provide what is missing below the root.
        sources: where the files come from.
        train, val, test, drop_empty, cache_images and what follows: see :class:`~detseg.data.files.FileData`.

    Raises:
        ValueError: settings that contradict each other.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        images: Pattern = "{split}/images",
        masks: Pattern = "{split}/masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        lists: Pattern | None = None,
        nested: bool = False,
        holds: str = "classes",
        values: Mapping[int, str | None] | Sequence[str | None] | None = None,
        instance_divisor: int | None = None,
        download: bool = False,
        sources: Sequence[Source] = (),
        train: str | None = "train",
        val: str | None = "val",
        test: str | None = None,
        drop_empty: bool = False,
        cache_images: bool | str = AUTO,
        truth: str = "semantic",
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
        if holds not in ("classes", "instances"):
            raise ValueError(f"MaskFolder: holds={holds!r} is unknown; choose classes or instances")
        if holds == "classes" and truth != "semantic":
            raise ValueError(
                f"MaskFolder: truth={truth!r} needs objects, but maps of classes do not tell them apart; use a "
                "semantic model, or maps of instance ids with data.holds=instances"
            )
        if values is None and class_names is None:
            raise ValueError(
                "MaskFolder: set data.values, such as {0: background, 255: person} or, for maps of instance ids of one "
                "class, {1: person}; or data.class_names: what a value stands for is not guessed"
            )
        if download and not sources:
            raise ValueError("MaskFolder: data.download=true, but data.sources names no place to fetch from")
        self.images, self.masks, self.image_suffix, self.mask_suffix = images, masks, image_suffix, mask_suffix
        self.lists, self.nested, self.holds, self.instance_divisor = lists, nested, holds, instance_divisor
        self.download, self.sources = download, sources
        self.values = None if values is None else _table(values)

    def options(self) -> str:
        """Add what the values mean and where the files lie."""
        parts = (self.images, self.masks, self.image_suffix, self.mask_suffix, self.lists, self.nested, self.holds)
        return f"{super().options()} {parts} {self.values} {self.instance_divisor} {self.split_names}"

    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the list of names, if there is one, and the folders of images and maps.

        The maps count like the images, by size and time of change: reading a hundred thousand of them takes half a
        minute, at every start.
        """
        listed = self._list(split)
        return [listed] if listed else [], [self.path(self.images, split), self.path(self.masks, split)]

    def pairs(self, split: str) -> Pairs:
        """Return the images and maps of ``split``."""
        try:
            return find_pairs(
                self.path(self.images, split),
                self.path(self.masks, split),
                image_suffix=self.image_suffix,
                mask_suffix=self.mask_suffix,
                nested=self.nested,
                listed=self._list(split),
            )
        except DataError as error:
            raise DataError(f"MaskFolder: {error}{self.hint}") from error

    def scan(self, split: str) -> StoreBuilder:
        """Read every map of ``split``."""
        pairs, source = self.pairs(split), str(self.path(self.masks, split))
        if self.holds == "classes":
            names = self._map_names()
            builder = StoreBuilder(source=source, categories=dict(enumerate(names)))
            builder.map_labels = self._map_labels(names)
        else:
            builder = StoreBuilder(source=source, categories=self._object_names(), wanted=self.wanted_objects)
        told = time.monotonic()
        for number, name in enumerate(pairs.names):
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                log.info(
                    "%s: %d of %d maps checked; the result is kept for later runs", source, number, len(pairs.names)
                )
            image, file = pairs.images.get(name), pairs.maps.get(name)
            if image is None:
                builder.report.add(
                    "missing_image", f"{name} has {'neither image nor map' if file is None else 'a map only'}"
                )
            elif file is None:
                builder.report.add("missing_mask", str(image))
            else:
                self._add(builder, image, file)
        return builder

    def _add(self, builder: StoreBuilder, image: Path, file: Path) -> None:
        size, name, number = image_size(image), below(self.root, image), len(builder.files)
        if self.holds == "classes":
            found = count_values(check_map(file, size, self._meanings().keys()))
            builder.add_image(name, number, size, map_file=below(self.root, file), map_values=found)
            return
        row, divisor = builder.add_image(name, number, size), self.instance_divisor
        values = check_map(file, size, None)
        skipped = np.unique(values[values < divisor]).tolist() if divisor else [0]
        for value, box, code in segments(values, skip=skipped):
            category = value // divisor if divisor else 1
            listed = self._object_names() if self.values is None or not divisor else self.values
            if category not in listed:
                raise DataError(
                    f"{file}: value {value} is of class {category}; allowed are {sorted(listed)} "
                    f"(value // {divisor}). List it in data.values, with a class or with null to leave it out"
                )
            if listed[category] is not None:
                builder.add(RawObject(row, box, category, f"object {value}", code=code))

    def _list(self, split: str) -> Path | None:
        return None if self.lists is None else self.path(self.lists, split)

    def _map_names(self) -> list[str]:
        """Return the class names in the order of their labels: of their lowest values, or as asked for."""
        if self.values is None:
            return list(self.wanted_names or ())
        found = list(dict.fromkeys(name for _, name in sorted(self.values.items()) if name is not None))
        wanted = self.wanted_names
        return wanted if wanted is not None and sorted(wanted) == sorted(found) else found

    def _meanings(self) -> dict[int, str | None]:
        """Return what each value of a map of classes stands for."""
        if self.values is not None:
            return self.values
        return {IGNORE_INDEX: None} | dict(enumerate(self.wanted_names or ()))

    def _map_labels(self, names: list[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if len(names) > IGNORE_INDEX:
            raise DataError(f"MaskFolder: {len(names)} classes; labels end at {IGNORE_INDEX - 1}, 255 means ignored")
        meanings = self._meanings()
        labels = np.full(max(meanings) + 1, IGNORE_INDEX, dtype=np.uint8)
        for value, name in meanings.items():
            labels[value] = IGNORE_INDEX if name is None else names.index(name)
        return labels

    def _object_names(self) -> dict[int, str]:
        """Return class id -> name of the objects in a map of instance ids."""
        if self.instance_divisor is None:
            names = [name for value, name in (self.values or {}).items() if value != 0 and name is not None]
            name = (self.wanted_objects or names or ["object"])[0]
            return {1: name}
        if self.values is None:
            return dict(enumerate(self.wanted_objects or (), start=1))
        return {value: name for value, name in self.values.items() if name is not None}


def _table(values: Mapping[int, str | None] | Sequence[str | None]) -> dict[int, str | None]:
    """Return value -> class name from either form."""
    if not isinstance(values, Mapping):
        return {IGNORE_INDEX: None} | dict(enumerate(values))
    if not all(str(value).isdecimal() for value in values):
        raise ValueError(f"MaskFolder: values must be {{value: class}}, such as {{0: background}}, got {values}")
    return {int(value): name for value, name in values.items()}
