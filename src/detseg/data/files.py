"""What the readers of files share: splits by name, the checked store, images kept in memory."""

from __future__ import annotations

import multiprocessing
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detseg.data import cache
from detseg.data.builder import StoreBuilder
from detseg.data.check import DataError, Report
from detseg.data.image import image_size, read_image, read_map
from detseg.data.module import DetectionData
from detseg.data.sample import Sample, SampleDataset
from detseg.data.source import Source, provide_all
from detseg.data.store import AnnotationStore
from detseg.structures import SemanticMap
from detseg.structures.maps import IGNORE_INDEX

Pattern = str | Mapping[str, str]
"""A path below the root in which ``{split}`` stands for the split's name, or one such path for each split."""


AUTO = "auto"
"""Of ``cache_images``: keep the images of a split whose pixels take no more than ``KEPT_BYTES``."""

KEPT_BYTES = 2**30

DECODERS = 8
"""Threads that decode images to keep, at most."""


class StoreDataset(SampleDataset):
    """Samples of a store.

    Args:
        store: checked annotations.
        report: what the check found.
        root: folder that the store's files are relative to.
        truth: ``boxes``, ``instances`` or ``semantic``; the last takes the store's maps, or paints the objects on
            class 0, background, where it has none.
        keep_empty: whether images without objects are among the samples.
        cache_images: decode every image, and paint or read every map, once before workers start, and keep height x
            width x 3 (with maps, 4) bytes of each.
    """

    def __init__(
        self,
        *,
        store: AnnotationStore,
        report: Report,
        root: Path,
        truth: str = "boxes",
        keep_empty: bool = True,
        cache_images: bool = False,
    ) -> None:
        self.store, self.report, self.root, self.truth, self.cache_images = store, report, root, truth, cache_images
        self.class_names = [store.class_names[label] for label in range(len(store.class_names))]
        self.category_ids = store.category_ids.tolist()
        self._painted = truth == "semantic" and len(store.maps) == 0
        if self._painted:
            self.class_names = ["background", *self.class_names]
            self.category_ids = [-1 if 0 in self.category_ids else 0, *self.category_ids]
        if truth == "semantic" and len(self.class_names) > IGNORE_INDEX:
            raise DataError(
                f"{report.source}: {len(self.class_names)} classes with the background; labels of a map end at "
                f"{IGNORE_INDEX - 1}, as {IGNORE_INDEX} means ignored. Choose fewer with data.class_names"
            )
        filled = (
            np.diff(store.offsets) > 0 if not (keep_empty or len(store.maps)) else np.ones(len(store), dtype=np.bool_)
        )
        self._rows = np.flatnonzero(filled)
        self._kept: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self._rows[index])
        target = self.store.target(row, masks=self.truth == "instances")
        pixels, labels = self._kept[row] if row in self._kept else self._load(row)  # (H, W, 3), (H, W)
        if labels is not None:
            target.semantic = SemanticMap(torch.from_numpy(labels.astype(np.int64)))
        return Sample(torch.from_numpy(pixels).permute(2, 0, 1), target)  # cached pixels are shared: never write there

    def file_of(self, index: int) -> str:
        """Return the path of image ``index``."""
        return str(self.root / self.store.files[int(self._rows[index])])

    def identity(self, index: int) -> str:
        """Return the path of image ``index``, its size in bytes and the time of its last change."""
        path = self.file_of(index)
        try:
            state = os.stat(path)
        except OSError:  # whoever reads it names it
            return ""
        return f"{path} {state.st_size} {state.st_mtime_ns}"

    def prepare(self) -> None:
        """Load every image and map, if ``cache_images``; forked workers share the arrays."""
        if self.cache_images and not self._kept:
            rows = self._rows.tolist()
            with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:  # decoders let go of Python's lock
                self._kept = dict(zip(rows, pool.map(self._load, rows), strict=True))

    @property
    def pixel_bytes(self) -> int:
        """Bytes that all images take once they are decoded, with their maps where the truth has them."""
        pixels = int(self.store.sizes[self._rows].prod(axis=1).sum())
        return pixels * (4 if self.truth == "semantic" else 3)

    def _load(self, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return the pixels ``(H, W, 3)``, and the map ``(H, W)`` where there is one."""
        path, size = self.root / self.store.files[row], self.store.size(row)
        image = read_image(path)  # (3, H, W)
        if image.shape[1:] != size:
            raise DataError(
                f"{path}: {image.shape[1]} x {image.shape[2]} pixels (height x width), but {size[0]} x {size[1]} "
                "when it was checked; start the run again to check it anew"
            )
        return image.permute(1, 2, 0).numpy(), self._map(row) if self.truth == "semantic" else None

    def _map(self, row: int) -> NDArray[np.uint8]:
        if self._painted:
            return self.store.paint(row).labels.numpy().astype(np.uint8)
        return self.store.map_labels[read_map(self.root / self.store.maps[row])]


class FileData(DetectionData):
    """Base of the data modules that read files: checks a split once and keeps the result.

    Args:
        root: folder that all paths are relative to.
        train: name of the training split as the paths have it; ``None`` where there is none.
        val: name of the validation split.
        test: name of the test split.
        drop_empty: leave images without objects out of training; evaluation always keeps them.
        cache_images: decode every image once and keep the pixels in memory; ``"auto"``: where those of a split take
            no more than 1 GiB, and workers are forked, which share them.
        truth: see :class:`~detseg.data.module.DetectionData`, as for all that follow.
        num_classes: checked against the files.
        class_names: classes to keep, in the order of the labels; objects of others are left out and reported.
        train_transform: recipe for training samples.
        eval_transform: recipe for evaluation samples.
        batch_size: images per training step.
        eval_batch_size: images per evaluation step.
        num_workers: loading processes.
        size_divisor: batches are padded to multiples of this many pixels.
        seed: of order and augmentation.
        drop_last: leave out a smaller last batch in training.
        pin_memory: page-locked batches.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | None,
        val: str | None,
        test: str | None,
        drop_empty: bool,
        cache_images: bool | str,
        truth: str,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        train_transform: Callable[..., Any] | None,
        eval_transform: Callable[..., Any] | None,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        size_divisor: int,
        seed: int,
        drop_last: bool,
        pin_memory: bool | None,
    ) -> None:
        super().__init__(
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
        if cache_images not in (True, False, AUTO):
            raise ValueError(f"cache_images must be true, false or {AUTO}, got {cache_images!r}")
        self.root, self.drop_empty, self.cache_images = Path(root).expanduser(), drop_empty, cache_images
        names = {"train": train, "val": val, "test": test}
        self.split_names = {split: name for split, name in names.items() if name is not None}
        self.splits = tuple(self.split_names)
        if not self.splits:
            raise ValueError(f"{type(self).__name__}: train, val and test are all None; name at least one split")

    download: bool = False
    """Whether ``sources`` provide what is missing before the first split is read; readers that can set both."""
    sources: Sequence[Source] = ()

    @property
    def hint(self) -> str:
        """What to add to a message about a missing file: how it can be fetched, where that is so."""
        missing = bool(self.sources) and not self.download and not all(each.ready(self.root) for each in self.sources)
        return "; or data.download=true to fetch the data set" if missing else ""

    @abstractmethod
    def inputs(self, split: str) -> tuple[Iterable[Path], Iterable[Path]]:
        """Return the annotation files of ``split`` and the folders of its images: what a cached check depends on."""

    @abstractmethod
    def scan(self, split: str) -> StoreBuilder:
        """Read every annotation of ``split``."""

    def options(self) -> str:
        """Return the settings that change what :meth:`scan` finds, as text; subclasses add theirs."""
        return f"{type(self).__module__}.{type(self).__name__} {self.root} {self.truth} {self.wanted_names}"

    def read(self, split: str) -> StoreDataset:
        """Return the checked samples of ``split``, from the cache if nothing has changed since the last check."""
        if self.download:
            provide_all(self.sources, self.root)
        if not self.root.is_dir():
            raise DataError(f"{type(self).__name__}: there is no folder {self.root}; set data.root{self.hint}")
        contents, folders = self.inputs(split)
        key = cache.fingerprint(options=f"{self.options()} {split}", contents=contents, folders=folders)
        kept = cache.load(key)
        if kept is None:
            builder = self.scan(split)
            kept = builder.build(allow_empty=split == "test"), builder.report
            cache.save(key, *kept)
        store, report = kept
        samples = StoreDataset(
            store=store,
            report=report,
            root=self.root,
            truth=self.truth,
            keep_empty=split != "train" or not self.drop_empty,
        )
        samples.cache_images = self._keeps(samples)
        return samples

    def _keeps(self, samples: StoreDataset) -> bool:
        """Say whether the images of a split stay in memory."""
        if self.cache_images != AUTO:
            return bool(self.cache_images)
        return samples.pixel_bytes <= KEPT_BYTES and (self.num_workers == 0 or _workers_share_memory())

    @property
    def need_masks(self) -> bool:
        """Whether an object is of no use without a mask."""
        return self.truth != "boxes"

    @property
    def wanted_objects(self) -> list[str] | None:
        """The wanted names without the background that painted maps add."""
        names = self.wanted_names
        return names[1:] if names and self.truth == "semantic" and names[0] == "background" else names

    def path(self, pattern: Pattern, split: str) -> Path:
        """Return the path that ``pattern`` gives for ``split``.

        Raises:
            DataError: the pattern is a mapping that lacks the split.
        """
        if not isinstance(pattern, str):
            if split not in pattern:
                raise DataError(f"{type(self).__name__}: no path for split {split!r} among {dict(pattern)}")
            pattern = pattern[split]
        return self.root / pattern.format(split=self.split_names[split])


def _workers_share_memory() -> bool:
    """Say whether loading processes see what the main process holds; those that are not forked get copies."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"


def upright_size(path: Path, annotated: tuple[int, int] | None, report: Report) -> tuple[int, int]:
    """Return the (height, width) of an image as the reader gives it, and report an annotation that disagrees.

    Raises:
        DataError: the file is no image; or the annotation was made before the file's EXIF rotation, so that its boxes
            lie elsewhere in the upright image.
    """
    size = image_size(path)
    if annotated is not None and annotated != size:
        if annotated == size[::-1] and image_size(path, upright=False) == annotated:
            raise DataError(
                f"{path}: annotated as {annotated[0]} x {annotated[1]} (height x width), which is the image before its "
                f"EXIF rotation; upright it is {size[0]} x {size[1]}. Rotate the boxes, or remove the file's EXIF tag"
            )
        report.add("image_size", f"{path.name}: annotated {annotated}, file {size} (height, width)")
    return size


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 file, with or without the mark that Windows programs put first.

    Raises:
        DataError: it is of another encoding.
        FileNotFoundError: there is no such file.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from error


def below(root: Path, path: Path) -> str:
    """Return ``path`` as the store keeps it: relative to ``root``, or absolute where it lies elsewhere."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
