"""Pascal VOC: XML boxes, and palette PNGs of classes and objects.

VOC counts pixels from 1 and its xmax and ymax are the last pixels inside (devkit, ``VOCevaldet.m``: width is
xmax - xmin + 1). Here a box is (xmin - 1, ymin - 1, xmax, ymax), the outer edges of its pixels. A box whose xmax
is not above its xmin would be one pixel wide by that rule; in practice it is a slip of the mouse, and is dropped and
reported, as is one whose ymax is not above its ymin. In the PNGs 255 is the border between objects: it is ignored.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError
from detseg.data.files import AUTO, FileData, below, read_text, upright_size
from detseg.data.image import SUFFIXES
from detseg.data.maps import check_map, count_values, identity_labels, segments
from detseg.structures.maps import IGNORE_INDEX

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of VOC 2007 to 2012, in the devkit's order: class k has value k + 1 in the PNGs."""


class Voc(FileData):
    """A folder laid out as VOC's: JPEGImages, ImageSets, Annotations, SegmentationClass and SegmentationObject.

    Boxes come from the XML files. For ``truth="semantic"`` the class PNGs are read, with class 0 "background"; for
    ``truth="instances"`` masks, and the boxes around them, come from the object PNGs, each object's class from the
    class PNG, and ``difficult`` from the XML, whose n-th object is value n.

    Args:
        root: folder of the data set, such as ``VOCdevkit/VOC2012``.
        image_set: folder of the lists below ``ImageSets``: ``Main`` or ``Segmentation``.
        class_names: the classes in the order of their labels; with PNGs, in the order of their values from 1.
            ``None``: VOC's twenty, if the XML files name no others; else the names that they use, sorted.
        train, val, test, drop_empty, cache_images and what follows: see :class:`~detseg.data.files.FileData`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        image_set: str = "Main",
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
        self.image_set = image_set

    def options(self) -> str:
        """Add the image set and the names of the splits, from which class names are collected."""
        return f"{super().options()} {self.image_set} {self.split_names}"

    def stems(self, split: str) -> list[str]:
        """Return the image names of ``split`` without their endings.

        Raises:
            DataError: the list is missing or empty.
        """
        file = self.root / "ImageSets" / self.image_set / f"{self.split_names[split]}.txt"
        if not file.is_file():
            raise DataError(f"{file}: no such list; set data.image_set and the names of the splits")
        stems = [self._stem(line.strip()) for line in read_text(file).splitlines() if line.strip()]
        if not stems:
            raise DataError(f"{file}: names no image")
        return stems

    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the annotation files (every split's where names are collected), and the folders of images and maps."""
        stems = [stem for each in self.splits for stem in self.stems(each)] if self.wanted_names is None else []
        contents = [self._xml(stem) for stem in stems or self.stems(split)]
        maps = ("SegmentationClass", "SegmentationObject") if self.truth != "boxes" else ()
        return [self.root / "ImageSets" / self.image_set / f"{self.split_names[split]}.txt", *contents], [
            self.root / folder for folder in ("JPEGImages", *maps)
        ]

    def scan(self, split: str) -> StoreBuilder:
        """Read the XML files and PNGs of ``split``."""
        trees = {stem: self._tree(stem) for stem in self.stems(split)}
        names = self.wanted_objects or self._all_names()
        if self.truth == "boxes":
            known = list(dict.fromkeys([*names, *sorted(_names(trees.values()))]))  # others are left out and reported
        else:
            known = ["background", *names] if self.truth == "semantic" else names
        builder = StoreBuilder(
            source=f"{self.root} {self.split_names[split]}",
            categories={name: name for name in known},
            wanted=names if self.truth == "boxes" else known,
        )
        if self.truth == "semantic":
            builder.map_labels = identity_labels(len(known))
        for number, (stem, tree) in enumerate(trees.items()):
            self._add(builder, number, stem, tree, names)
        return builder

    def _add(
        self, builder: StoreBuilder, number: int, stem: str, tree: ElementTree.Element | None, names: list[str]
    ) -> None:
        image = self._image(stem)
        if image is None:
            builder.report.add("missing_image", str(self.root / "JPEGImages" / f"{stem}.*"))
            return
        size = upright_size(image, _size(tree), builder.report)
        file = below(self.root, image)
        if self.truth == "boxes":
            row = builder.add_image(file, number, size)
            for place, item in enumerate(tree.iter("object") if tree is not None else ()):
                builder.add(_object(self._xml(stem), row, place + 1, item))
            return
        classes = self.root / "SegmentationClass" / f"{stem}.png"
        if not classes.is_file():
            builder.report.add("missing_mask", str(classes))
            return
        values = check_map(classes, size, {*range(len(names) + 1), IGNORE_INDEX})
        if self.truth == "semantic":
            builder.add_image(file, number, size, map_file=below(self.root, classes), map_values=count_values(values))
            return
        row = builder.add_image(file, number, size)
        for found in self._instances(row, stem, size, values, names, tree):
            builder.add(found)

    def _instances(
        self,
        row: int,
        stem: str,
        size: tuple[int, int],
        classes: np.ndarray[Any, np.dtype[np.int32]],
        names: list[str],
        tree: ElementTree.Element | None,
    ) -> list[RawObject]:
        file = self.root / "SegmentationObject" / f"{stem}.png"
        listed = list(tree.iter("object")) if tree is not None else []
        found = []
        objects = check_map(file, size, None)
        for value, box, code in segments(objects, skip=(0, IGNORE_INDEX)):
            inside = classes[objects == value]
            counts = np.bincount(inside[(inside > 0) & (inside != IGNORE_INDEX)], minlength=1)
            if counts.sum() == 0:
                raise DataError(f"{file}: object {value} covers no pixel that has a class in SegmentationClass")
            name = names[int(counts.argmax()) - 1]
            same = value <= len(listed) and listed[value - 1].findtext("name", "").strip() == name
            difficult = same and _flag(listed[value - 1], "difficult")
            found.append(RawObject(row, box, name, f"object {value}", difficult=difficult, code=code))
        return found

    def _all_names(self) -> list[str]:
        """Return the class names where none were asked for, from the XML of all splits, which must agree."""
        names = _names(self._tree(stem) for split in self.splits for stem in self.stems(split))
        return list(VOC_CLASSES) if names <= set(VOC_CLASSES) else sorted(names)

    def _stem(self, line: str) -> str:
        """Return the name in a line of a list, without the flag -1, 0 or 1 that the lists of one class have."""
        name, *flag = line.rsplit(maxsplit=1)
        return name if flag and flag[0] in ("-1", "0", "1") and self._image(line) is None else line

    def _image(self, stem: str) -> Path | None:
        endings = (spelt for suffix in (".jpg", *sorted(SUFFIXES)) for spelt in (suffix, suffix.upper()))
        candidates = (self.root / "JPEGImages" / f"{stem}{ending}" for ending in endings)
        return next((path for path in candidates if path.is_file()), None)

    def _xml(self, stem: str) -> Path:
        return self.root / "Annotations" / f"{stem}.xml"

    def _tree(self, stem: str) -> ElementTree.Element | None:
        """Return the parsed XML; boxes need it, PNGs do without."""
        file = self._xml(stem)
        if not file.is_file() and self.truth != "boxes":
            return None
        try:
            return ElementTree.parse(file).getroot()
        except FileNotFoundError as error:
            raise DataError(f"{file}: no such file, but ImageSets/{self.image_set} lists {stem}") from error
        except ElementTree.ParseError as error:
            raise DataError(f"{file}: not XML ({error})") from error


def _names(trees: Iterable[ElementTree.Element | None]) -> set[str]:
    names = {item.findtext("name", "").strip() for tree in trees if tree is not None for item in tree.iter("object")}
    return names - {""}  # an object without a name is an error where it is read


def _size(tree: ElementTree.Element | None) -> tuple[int, int] | None:
    size = None if tree is None else tree.find("size")
    if size is None:
        return None
    try:
        height, width = (int(float(size.findtext(key) or 0)) for key in ("height", "width"))
    except ValueError:  # the file's own size is used anyway
        return None
    return (height, width) if height and width else None  # some tools write zeros


def _object(file: Path, row: int, number: int, item: ElementTree.Element) -> RawObject:
    name, where = item.findtext("name", "").strip(), f"object {number}"
    if not name:
        raise DataError(f"{file}: {where} has no name; allowed are class names")
    box = item.find("bndbox")
    try:
        if box is None:
            raise ValueError("no bndbox")
        xmin, ymin, xmax, ymax = (float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DataError(f"{file}: {where} ({name}) needs a bndbox of four numbers: {error}") from error
    if xmax > xmin and ymax > ymin:
        xmin, ymin = xmin - 1, ymin - 1
    return RawObject(row, [xmin, ymin, xmax, ymax], name, where, difficult=_flag(item, "difficult"))


def _flag(item: ElementTree.Element, key: str) -> bool:
    return (item.findtext(key) or "0").strip() == "1"
