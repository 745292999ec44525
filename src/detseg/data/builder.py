"""From what a reader finds to a checked store: every box is looked at once, all together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from detseg.data.check import FIRST_FEW, DataError, Report, both_lists
from detseg.data.store import AnnotationStore, Array, Texts
from detseg.ops import rle
from detseg.structures.maps import IGNORE_INDEX

SLACK = 0.01
"""Pixels that a box may stick out unreported: the rounding of two decimals. It is clipped all the same."""


@dataclass
class RawObject:
    """One object as a file has it.

    Attributes:
        image: row of its image in the builder.
        box: xyxy in pixels, unchecked; ``None``: the outline of its mask.
        category: the data set's own id or name.
        where: how a message names it, such as ``"annotation 12"``.
        iscrowd: COCO's flag.
        difficult: VOC's flag.
        area: square pixels, or ``None`` for the mask's, else the box's.
        rings: polygons as flat x, y, ...
        code: compressed run-length code.
    """

    image: int
    box: Sequence[float] | None
    category: int | str
    where: str
    iscrowd: bool = False
    difficult: bool = False
    area: float | None = None
    rings: list[list[float]] = field(default_factory=list)
    code: bytes = b""


class StoreBuilder:
    """Collects images and objects, repairs what can be repaired, and packs the rest.

    Args:
        source: file or folder, for messages and the report.
        categories: what an object may be: own id -> name, in the order of the labels.
        wanted: names to keep, in the order of the labels wanted; ``None`` keeps all.
        need_masks: drop (and report) objects without a mask.

    Raises:
        DataError: a name occurs twice, or a wanted name is not among the categories.
    """

    def __init__(
        self,
        *,
        source: str,
        categories: dict[int, str] | dict[str, str],
        wanted: Sequence[str] | None = None,
        need_masks: bool = False,
    ) -> None:
        self.report, self.wanted, self.need_masks = Report(source), wanted, need_masks
        names = list(categories.values())
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DataError(f"{source}: class names {twice} stand for several ids; names must differ. All: {names}")
        missing = [name for name in wanted or () if name not in names]
        if missing:
            raise DataError(f"{source}: no classes named {missing}. {both_lists(wanted, names)}")
        self.found_names = names
        self.names = names if wanted is None else list(wanted)
        own_ids = {name: own for own, name in categories.items()}
        self.known: set[int | str] = set(categories)
        self.labels: dict[int | str, int] = {own_ids[name]: label for label, name in enumerate(self.names)}
        self.own_ids = [own_ids[name] for name in self.names]
        self.files: list[str] = []
        self.maps: list[str] = []
        self.map_labels: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self.map_values: set[int] = set()
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.objects: list[RawObject] = []

    def add_image(
        self,
        file: str,
        image_id: int,
        size: tuple[int, int],
        map_file: str | None = None,
        map_values: Iterable[int] = (),
    ) -> int:
        """Add an image of upright (height, width) ``size``, with its map and the values in it; return its row."""
        self.files.append(file)
        self.image_ids.append(image_id)
        self.sizes.append(size)
        if map_file is not None:
            self.maps.append(map_file)
            self.map_values.update(map_values)
        return len(self.files) - 1

    def add(self, item: RawObject) -> None:
        """Add an object, unless its category is unknown or not wanted or its mask is missing; those are reported."""
        where = f"{item.where} of {self.files[item.image]}"
        if item.category not in self.known:
            self.report.add("unknown_category", f"{where}: {item.category!r}; known: {_few(list(self.known))}")
        elif item.category not in self.labels:
            self.report.add("other_class", f"{where}: {item.category!r}")
        elif self.need_masks and not item.code and not self._good_rings(item, where):
            self.report.add("no_mask", where)
        else:
            if not self.need_masks:
                self._good_rings(item, where)
            self.objects.append(item)

    def build(self, *, allow_empty: bool = False) -> AnnotationStore:
        """Return the checked store and complete the report.

        Raises:
            DataError: there are no images, or ``allow_empty`` is false and there are no objects, or no labelled pixel.
        """
        self.objects.sort(key=lambda item: item.image)  # stable: the file's order within an image
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        boxes, kept = self._check_boxes(sizes)
        self.objects = [item for item, keep in zip(self.objects, kept, strict=True) if keep]
        boxes = boxes[kept]
        counts = np.bincount([item.image for item in self.objects], minlength=len(self.files))
        self.report.images, self.report.objects = len(self.files), len(self.objects)
        if not self.maps:
            for row in np.flatnonzero(counts == 0):
                self.report.add("no_objects", self.files[row])
        if not self.files or not (self.objects or self.maps or allow_empty):
            raise DataError(
                f"{self.report.source}: nothing to learn from: {len(self.files)} images, {len(self.objects)} objects. "
                f"{both_lists(self.wanted, self.found_names)}\n{self.report}"
            )
        if self.maps:
            self._check_maps(allow_empty)
        return self._pack(sizes, boxes, counts)

    def _check_maps(self, allow_empty: bool) -> None:
        """Report the classes that no map shows; raise where none is shown at all and some have to be."""
        shown = {int(self.map_labels[value]) for value in self.map_values} - {IGNORE_INDEX}
        if not shown and not allow_empty:
            raise DataError(
                f"{self.report.source}: every pixel of {len(self.maps)} maps is ignored (values "
                f"{sorted(self.map_values)}); look at what they stand for, such as data.values"
            )
        for label, name in enumerate(self.names):
            if label not in shown:
                self.report.add("absent_class", name)

    def _good_rings(self, item: RawObject, where: str) -> bool:
        """Drop rings that are none; return whether any is left."""
        good = [ring for ring in item.rings if len(ring) >= 6 and len(ring) % 2 == 0 and bool(np.isfinite(ring).all())]
        for _ in range(len(item.rings) - len(good)):
            self.report.add("bad_polygon", where)
        item.rings = good
        return bool(good)

    def _check_boxes(self, sizes: Array) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return clipped boxes ``(N, 4)`` and which to keep ``(N,)``; count the faults."""
        boxes = np.array([self._box(item) for item in self.objects], dtype=np.float64).reshape(-1, 4)
        limits = sizes[[item.image for item in self.objects]][:, [1, 0]]  # (N, 2) width, height
        low, high = boxes[:, :2], boxes[:, 2:]  # (N, 2) each
        not_finite = ~np.isfinite(boxes).all(axis=1)
        with np.errstate(invalid="ignore"):  # comparisons with NaN are false, and those boxes are already counted
            inverted = ~not_finite & (high < low).any(axis=1)
            zero_area = ~not_finite & ~inverted & (high == low).any(axis=1)
            usable = ~(not_finite | inverted | zero_area)
            outside = usable & ((high <= 0) | (low >= limits)).any(axis=1)
            clipped = np.concatenate([np.clip(low, 0, limits), np.clip(high, 0, limits)], axis=1).astype(np.float32)
            outside |= usable & (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)  # a sliver that single precision loses
            usable &= ~outside
            beyond = usable & ((low < -SLACK) | (high > limits + SLACK)).any(axis=1)
        kinds = {"not_finite": not_finite, "inverted": inverted, "zero_area": zero_area, "outside": outside}
        for kind, rows in (kinds | {"clipped": beyond}).items():
            self._count(kind, np.flatnonzero(rows), lambda row: f"xyxy {_short(boxes[row])}")
        return clipped, usable

    def _box(self, item: RawObject) -> Sequence[float]:
        if item.box is not None:
            return item.box
        if item.code:
            size = list(self.sizes[item.image])
            return list(rle.boxes([rle.RLE(size=size, counts=item.code)])[0])
        points = np.concatenate([np.asarray(ring).reshape(-1, 2) for ring in item.rings] or [np.zeros((1, 2))])
        return [*points.min(axis=0), *points.max(axis=0)]

    def _count(self, kind: str, rows: NDArray[np.intp], value: Callable[[int], str]) -> None:
        for number, row in enumerate(rows):
            item = self.objects[row]
            described = f"{item.where} of {self.files[item.image]} {value(int(row))}" if number < FIRST_FEW else ""
            self.report.add(kind, described)

    def _areas(self, boxes: Array) -> Array:
        areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for row, item in enumerate(self.objects):
            if item.area is not None and np.isfinite(item.area):
                areas[row] = item.area
            elif item.code or item.rings:
                size = self.sizes[item.image]
                code = (
                    rle.RLE(size=list(size), counts=item.code) if item.code else rle.polygons_to_rle(item.rings, size)
                )
                areas[row] = rle.areas([code])[0]
        return areas

    def _pack(self, sizes: Array, boxes: Array, counts: Array) -> AnnotationStore:
        objects = self.objects
        rings = [ring for item in objects for ring in item.rings]
        ids = [own if isinstance(own, int) else label for label, own in enumerate(self.own_ids)]
        return AnnotationStore(
            class_names=Texts.of(self.names),
            category_ids=np.array(ids, dtype=np.int64),
            files=Texts.of(self.files),
            maps=Texts.of(self.maps),
            map_labels=self.map_labels,
            image_ids=np.array(self.image_ids, dtype=np.int64),
            sizes=sizes,
            offsets=_offsets(counts),
            boxes=boxes,
            labels=np.array([self.labels[item.category] for item in objects], dtype=np.int32),
            area=self._areas(boxes),
            iscrowd=np.array([item.iscrowd for item in objects], dtype=np.bool_),
            difficult=np.array([item.difficult for item in objects], dtype=np.bool_),
            ring_offsets=_offsets([len(item.rings) for item in objects]),
            point_offsets=_offsets([len(ring) for ring in rings]),
            points=np.array([value for ring in rings for value in ring], dtype=np.float64),
            code_offsets=_offsets([len(item.code) for item in objects]),
            codes=np.frombuffer(b"".join(item.code for item in objects), dtype=np.uint8),
        )


def _offsets(lengths: Sequence[int] | Array) -> Array:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _short(box: Array) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in box) + "]"


def _few(values: list[int | str]) -> str:
    shown = ", ".join(map(repr, values[:FIRST_FEW]))
    return shown + (f", ... ({len(values)} in all)" if len(values) > FIRST_FEW else "")
