"""COCO JSON (https://cocodataset.org/#format-data): boxes, polygons, run-length codes, crowd regions.

Category ids may have gaps: labels are 0..K-1 in the order of the ids, and the ids are kept. Boxes are x, y, width,
height with pixel edges at whole numbers, so x + width is the right edge. An object without a box gets that of its mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError
from detseg.data.files import AUTO, FileData, Pattern, below, read_text, upright_size
from detseg.ops import rle


class Coco(FileData):
    """Images with a COCO JSON file per split.

    Args:
        root: folder of the data set.
        annotations: JSON file below the root.
        images: folder of the images below the root.
        train, val, test, drop_empty, cache_images and what follows: see :class:`~detseg.data.files.FileData`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        annotations: Pattern = "annotations/instances_{split}.json",
        images: Pattern = "{split}",
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
        self.annotations, self.images = annotations, images

    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the JSON file and the image folder."""
        return [self.path(self.annotations, split)], [self.path(self.images, split)]

    def scan(self, split: str) -> StoreBuilder:
        """Read the JSON file of ``split``."""
        file, folder = self.path(self.annotations, split), self.path(self.images, split)
        content = _load(file)
        builder = StoreBuilder(
            source=str(file),
            categories=_categories(file, content["categories"]),
            wanted=self.wanted_objects,
            need_masks=self.need_masks,
        )
        rows = _add_images(builder, file, content["images"], folder, self.root)
        _add_objects(builder, file, content.get("annotations", []), rows)
        return builder


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file; set data.annotations") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    missing = [key for key in ("images", "categories") if not isinstance(content, dict) or key not in content]
    if missing:
        kind = "a list, as results are" if isinstance(content, list) else f"keys {list(content)}"
        raise DataError(
            f"{file}: {missing} missing; a COCO file has images, annotations and categories, this is {kind}"
        )
    for key in ("images", "annotations", "categories"):
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{file}: {key!r} must be a list of objects {{...}}, it is {str(entries)[:80]}")
    return dict(content)


def _categories(file: Path, entries: list[dict[str, Any]]) -> dict[int, str]:
    """Return own id -> name in the order of the ids."""
    found: dict[int, str] = {}
    for entry in entries:
        number = _whole(file, "category", entry, "id")
        name = str(_field(file, f"category {number}", entry, "name"))
        if found.setdefault(number, name) != name:
            raise DataError(f"{file}: category id {number} stands for both {found[number]!r} and {name!r}")
    return dict(sorted(found.items()))


def _add_images(
    builder: StoreBuilder, file: Path, entries: list[dict[str, Any]], folder: Path, root: Path
) -> dict[int, int | None]:
    """Add the images and return own id -> row; ``None`` for an image whose file is missing."""
    rows: dict[int, int | None] = {}
    names: dict[int, str] = {}
    for entry in entries:
        number = _whole(file, "image", entry, "id")
        name = str(_field(file, f"image {number}", entry, "file_name"))
        if number in rows:
            if names[number] != name:
                raise DataError(f"{file}: image id {number} stands for both {names[number]!r} and {name!r}")
            builder.report.add("duplicate_id", f"image {number} ({name}), listed twice")
            continue
        names[number] = name
        path = folder / name
        if not path.is_file():
            builder.report.add("missing_image", str(path))
            rows[number] = None
            continue
        sized = entry.get("height") and entry.get("width")
        where = f"image {number}"
        annotated = (_whole(file, where, entry, "height"), _whole(file, where, entry, "width")) if sized else None
        size = upright_size(path, annotated, builder.report)
        rows[number] = builder.add_image(below(root, path), number, size)
    return rows


def _add_objects(builder: StoreBuilder, file: Path, entries: list[dict[str, Any]], rows: dict[int, int | None]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        number = str(entry.get("id", f"number {place}"))  # id 0 is as good as any
        where = f"annotation {number}"
        image_id = _whole(file, where, entry, "image_id")
        if image_id not in rows:
            builder.report.add("unknown_image", f"{where}: image {image_id}")
            continue
        if number in seen:
            same = seen[number] == entry
            builder.report.add("duplicate_id", f"{where}{' (exact copy, dropped)' if same else ''}")
            if same:
                continue
        seen[number] = entry
        row = rows[image_id]
        if row is not None:
            builder.add(_object(file, where, entry, row, builder.sizes[row]))


def _object(file: Path, where: str, entry: dict[str, Any], row: int, size: tuple[int, int]) -> RawObject:
    item = RawObject(
        image=row,
        box=_box(file, where, entry),
        category=_whole(file, where, entry, "category_id"),
        where=where,
        iscrowd=entry.get("iscrowd") is not None and _whole(file, where, entry, "iscrowd") != 0,
        area=None if entry.get("area") is None else _number(file, where, entry, "area"),
    )
    shape = entry.get("segmentation")
    if isinstance(shape, dict):
        item.code = _code(file, where, shape, size)
    elif isinstance(shape, list):
        rings = shape if not shape or isinstance(shape[0], list) else [shape]
        try:
            item.rings = [[float(value) for value in ring] for ring in rings]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{file}: {where} has segmentation {str(shape)[:80]}; allowed are lists of numbers x1, y1, x2, y2, ..."
            ) from error
    if item.box is None and not (item.code or item.rings):
        raise DataError(f"{file}: {where} has neither a bbox nor a segmentation")
    return item


def _box(file: Path, where: str, entry: dict[str, Any]) -> list[float] | None:
    box = entry.get("bbox")
    if not box:
        return None
    try:
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: {where} has bbox {box!r}; allowed are 4 numbers x, y, width, height") from error
    return [x, y, x + width, y + height]


def _code(file: Path, where: str, shape: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Return a compressed run-length code of an image of ``size``, from either form."""
    counts, listed = shape.get("counts"), shape.get("size")
    coded = tuple(listed) if isinstance(listed, list) else listed
    if coded != size:
        raise DataError(f"{file}: {where} has a mask of size {coded}, but its image is {size} (height, width)")
    try:
        if isinstance(counts, list):
            return rle.compress(counts, size)["counts"]
        if not isinstance(counts, str):
            raise ValueError(f"counts must be a list or a string, got {type(counts).__name__}")
        code = counts.encode("ascii")
        rle.check_counts(np.array(rle.counts_of(code), dtype=np.int64), size)
        return code
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: {where} has a broken mask: {error}") from error


def _number(file: Path, where: str, entry: dict[str, Any], key: str) -> float:
    value = _field(file, where, entry, key)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: {where} has {key} {value!r}; allowed are numbers") from error


def _whole(file: Path, where: str, entry: dict[str, Any], key: str) -> int:
    """Return a whole number, which may be written as ``7``, ``7.0`` or ``"7"``."""
    value = _field(file, where, entry, key)
    try:
        number = int(value)
        if number != float(value):
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: {where} has {key} {value!r}; allowed are whole numbers") from error
    return number


def _field(file: Path, where: str, entry: dict[str, Any], key: str) -> Any:
    if not isinstance(entry, dict) or entry.get(key) is None:
        raise DataError(f"{file}: {where} has no {key!r}; it is {str(entry)[:120]}")
    return entry[key]
