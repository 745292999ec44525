"""All annotations of a split in a few flat numpy arrays.

A list of dicts costs every worker a copy: reading a Python object changes its reference count, which copies its memory
page (https://github.com/pytorch/pytorch/issues/13246). Flat arrays with offsets are shared by forked workers and
pickle quickly.
Naming: I = images, N = objects of all images in turn, R = rings of polygons, P = coordinates of rings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detseg.ops import rle
from detseg.structures import SemanticMap, Target
from detseg.structures.maps import IGNORE_INDEX

Array = NDArray[Any]


@dataclass(frozen=True)
class Texts:
    """A list of strings in two arrays.

    Attributes:
        letters: ``(L,)`` uint8, all strings in UTF-8, one after the other.
        ends: ``(I,)`` int64, where each string ends.
    """

    letters: Array
    ends: Array

    @staticmethod
    def of(strings: Sequence[str]) -> Texts:
        """Return ``strings`` packed."""
        encoded = [string.encode() for string in strings]
        return Texts(
            letters=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            ends=np.cumsum([len(item) for item in encoded], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self.ends[index - 1])
        return self.letters[start : int(self.ends[index])].tobytes().decode()


@dataclass(frozen=True)
class AnnotationStore:
    """The objects of a split, and where its files are.

    Attributes:
        class_names: ``(K,)`` one name per label.
        category_ids: ``(K,)`` int64, the data set's own id of each label.
        files: ``(I,)`` image files.
        maps: ``(I,)`` files of semantic maps, or of length 0.
        map_labels: label of each value in those maps, uint8, 255 = ignore; length 0 where there are no maps.
        image_ids: ``(I,)`` int64, the data set's own.
        sizes: ``(I, 2)`` int64, height and width of the upright image.
        offsets: ``(I + 1,)`` int64; image i has objects ``offsets[i]:offsets[i + 1]``.
        boxes: ``(N, 4)`` float32, xyxy in pixels, within the image.
        labels: ``(N,)`` int32, 0..K-1.
        area: ``(N,)`` float32, square pixels.
        iscrowd: ``(N,)`` bool.
        difficult: ``(N,)`` bool.
        ring_offsets: ``(N + 1,)`` int64; object n has rings ``ring_offsets[n]:ring_offsets[n + 1]``.
        point_offsets: ``(R + 1,)`` int64 into ``points``.
        points: ``(P,)`` float64, x and y in turn; double, because COCO's rasterisation rounds at fifths of a pixel.
        code_offsets: ``(N + 1,)`` int64 into ``codes``; an object has rings, or a code, or neither.
        codes: ``(C,)`` uint8, compressed run-length codes.
    """

    class_names: Texts
    category_ids: Array
    files: Texts
    maps: Texts
    map_labels: Array
    image_ids: Array
    sizes: Array
    offsets: Array
    boxes: Array
    labels: Array
    area: Array
    iscrowd: Array
    difficult: Array
    ring_offsets: Array
    point_offsets: Array
    points: Array
    code_offsets: Array
    codes: Array

    def __len__(self) -> int:
        return len(self.files)

    def size(self, index: int) -> tuple[int, int]:
        """Return the (height, width) of image ``index``."""
        return int(self.sizes[index, 0]), int(self.sizes[index, 1])

    def objects(self, index: int) -> range:
        """Return the rows of the objects of image ``index``."""
        return range(int(self.offsets[index]), int(self.offsets[index + 1]))

    def code(self, row: int, size: tuple[int, int]) -> rle.RLE | None:
        """Return the mask of object ``row`` as a run-length code, or ``None`` where it has a box alone."""
        start, end = int(self.code_offsets[row]), int(self.code_offsets[row + 1])
        if end > start:
            return rle.RLE(size=list(size), counts=self.codes[start:end].tobytes())
        rings = [
            self.points[int(self.point_offsets[ring]) : int(self.point_offsets[ring + 1])]
            for ring in range(int(self.ring_offsets[row]), int(self.ring_offsets[row + 1]))
        ]
        return rle.polygons_to_rle(rings, size) if rings else None

    def masks(self, index: int) -> Tensor:
        """Return the masks ``(n, H, W)`` bool of image ``index``; an object with a box alone has an empty one."""
        size = self.size(index)
        empty = rle.RLE(size=list(size), counts=b"")
        codes = [self.code(row, size) or empty for row in self.objects(index)]
        found = [number for number, code in enumerate(codes) if code["counts"]]
        if len(found) == len(codes):
            return rle.decode(codes, size)
        masks = torch.zeros((len(codes), *size), dtype=torch.bool)  # (n, H, W)
        masks[found] = rle.decode([codes[number] for number in found], size)
        return masks

    def target(self, index: int, *, masks: bool = False) -> Target:
        """Return the objects of image ``index``, with their masks if asked for."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Target(
            boxes=torch.from_numpy(self.boxes[rows].copy()),  # (n, 4); copies, so that nobody writes into the store
            labels=torch.from_numpy(self.labels[rows].astype(np.int64)),
            masks=self.masks(index) if masks else None,
            iscrowd=torch.from_numpy(self.iscrowd[rows].copy()),
            area=torch.from_numpy(self.area[rows].copy()),
            image_id=int(self.image_ids[index]),
            size=self.size(index),
            difficult=torch.from_numpy(self.difficult[rows].copy()),
            file=self.files[index],
        )

    def paint(self, index: int) -> SemanticMap:
        """Return a map drawn from the objects: 0 is background, label k is class k + 1.

        Large objects are painted first, so that small ones lie on top; crowd regions, whose pixels nobody has sorted,
        get the ignore index, and single objects lie on top of them.
        """
        size = self.size(index)
        painted = torch.zeros(size, dtype=torch.int64)  # (H, W)
        codes = {row: code for row in self.objects(index) if (code := self.code(row, size))}
        areas = dict(zip(codes, rle.areas(list(codes.values())).tolist(), strict=True))
        for row in sorted(codes, key=lambda row: (not self.iscrowd[row], -areas[row])):
            mask = rle.decode([codes[row]], size)[0]  # (H, W); one at a time, as a hundred large ones fill the memory
            painted.masked_fill_(mask, IGNORE_INDEX if self.iscrowd[row] else int(self.labels[row]) + 1)
        return SemanticMap(painted)

    def arrays(self) -> dict[str, Array]:
        """Return every array by name, for saving."""
        flat: dict[str, Array] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Texts):
                flat |= {f"{field.name}.letters": value.letters, f"{field.name}.ends": value.ends}
            else:
                flat[field.name] = value
        return flat

    @staticmethod
    def from_arrays(arrays: dict[str, Array]) -> AnnotationStore:
        """Return the store whose :meth:`arrays` these are."""
        values: dict[str, Any] = {}
        for field in fields(AnnotationStore):
            if field.name in arrays:
                values[field.name] = arrays[field.name]
            else:
                values[field.name] = Texts(arrays[f"{field.name}.letters"], arrays[f"{field.name}.ends"])
        return AnnotationStore(**values)
