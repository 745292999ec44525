"""Folders of images with a map each: classes (semantic), or instance ids (boxes, instance masks, semantic).

Which class a value stands for is written down, either as ``values`` such as ``{0: background, 255: person}`` or as
``class_names``, where value k is class k and 255 is ignored. A value that is not written down is an error: nothing is
guessed from the data. 8-bit and 16-bit grey and palette files are read alike, by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError
from detseg.data.files import FileData, Pattern, below
from detseg.data.image import SUFFIXES, image_size
from detseg.data.maps import Map, check_map, segments
from detseg.structures.maps import IGNORE_INDEX


class MaskFolder(FileData):
    """Images and maps that share their file names, up to endings.

    Args:
        root: folder of the data set.
        images: folder of the images below the root.
        masks: folder of the maps below the root; it may be the folder of the images, if ``mask_suffix`` is set.
        mask_suffix: what a map's name has after the image's, such as ``_inst``.
        holds: ``classes``: a value is a class; ``instances``: a value is one object, and 0 is none.
        values: value -> class name; several values may share a name, and ``null`` ignores the value. With ``instances``
            and a divisor, the class of an object is ``values[value // instance_divisor]``.
        instance_divisor: with ``instances``: an object's value is class * divisor + number, as in Cityscapes (1000);
            values below the divisor are no objects. ``None``: all objects are of one class.
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
        mask_suffix: str = "",
        holds: str = "classes",
        values: Mapping[int, str | None] | None = None,
        instance_divisor: int | None = None,
        train: str | None = "train",
        val: str | None = "val",
        test: str | None = None,
        drop_empty: bool = False,
        cache_images: bool = False,
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
        if not all(str(value).isdecimal() for value in values or {}):
            raise ValueError(f"MaskFolder: values must be {{value: class}}, such as {{0: background}}, got {values}")
        self.images, self.masks, self.mask_suffix, self.holds = images, masks, mask_suffix, holds
        self.instance_divisor = instance_divisor
        self.values = None if values is None else {int(value): name for value, name in values.items()}

    def options(self) -> str:
        """Add what the values mean and where the files lie."""
        parts = (self.images, self.masks, self.mask_suffix, self.holds, self.values, self.instance_divisor)
        return f"{super().options()} {parts} {self.split_names}"

    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the maps and the image folder."""
        folder = self.path(self.masks, split)
        contents = sorted(folder.glob(f"*{self.mask_suffix}.*")) if folder.is_dir() else []
        return contents, [self.path(self.images, split)]

    def scan(self, split: str) -> StoreBuilder:
        """Read every map of ``split``."""
        images, maps = self._pairs(split)
        if self.holds == "classes":
            names = self._map_names()
            builder = StoreBuilder(source=str(self.path(self.masks, split)), categories=dict(enumerate(names)))
            builder.map_labels = self._map_labels(names)
        else:
            builder = StoreBuilder(
                source=str(self.path(self.masks, split)), categories=self._object_names(), wanted=self.wanted_objects
            )
        for stem in sorted(maps.keys() - images.keys()):
            builder.report.add("missing_image", f"{stem} has a map only")
        for number, (stem, image) in enumerate(images.items()):
            if stem not in maps:
                builder.report.add("missing_mask", str(image))
                continue
            self._add(builder, number, image, maps[stem])
        return builder

    def _add(self, builder: StoreBuilder, number: int, image: Path, file: Path) -> None:
        size, name = image_size(image), below(self.root, image)
        if self.holds == "classes":
            check_map(file, size, np.flatnonzero(self._allowed()).tolist())
            builder.add_image(name, number, size, map_file=below(self.root, file))
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

    def _pairs(self, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return images and maps by their common name."""
        folder, masks = self.path(self.images, split), self.path(self.masks, split)
        for each in (folder, masks):
            if not each.is_dir():
                raise DataError(f"MaskFolder: there is no folder {each}; set data.images and data.masks")
        end = self.mask_suffix
        files = [
            path for path in sorted(masks.iterdir()) if path.suffix.lower() in SUFFIXES and path.stem.endswith(end)
        ]
        maps = {path.stem[: len(path.stem) - len(end)]: path for path in files}
        taken = set(maps.values())
        images = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path not in taken]
        found = {path.stem: path for path in images}
        for path in images:
            if found[path.stem] != path:
                raise DataError(f"{path} and {found[path.stem].name} share a name, so a map cannot tell them apart")
        return found, maps

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

    def _allowed(self) -> Map:
        allowed = np.zeros(max(self._meanings()) + 1, dtype=np.int32)
        allowed[list(self._meanings())] = 1
        return allowed

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
