"""Which image belongs to which map: by their names, up to endings and suffixes, or as a list of names says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from detseg.data.check import DataError
from detseg.data.files import read_text
from detseg.data.image import SUFFIXES


class Pairs(NamedTuple):
    """Images and maps by the name that they share: the path below their folder without suffix and ending.

    Attributes:
        names: of the split, in its order; each has an image, a map, both or, where a list says so, neither.
        images: name -> file.
        maps: name -> file.
    """

    names: list[str]
    images: dict[str, Path]
    maps: dict[str, Path]


def find_pairs(
    images: Path,
    masks: Path,
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    nested: bool = False,
    listed: Path | None = None,
) -> Pairs:
    """Return the images and maps of two folders, which may be the same.

    Args:
        images: folder of the images.
        masks: folder of the maps.
        image_suffix: what an image's name has after the common one; images without it are left aside.
        mask_suffix: likewise for maps.
        nested: look into folders within too; the names then have them in front, as in ``aachen/aachen_000000_000019``.
        listed: text file with a name a line; ``None``: all.

    Raises:
        DataError: a folder or the list is missing or the list empty, or two images or two maps share a name.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; set data.images and data.masks")
    maps = _by_name(masks, _files(masks, nested), mask_suffix)
    taken = {path for paths in maps.values() for path in paths}
    found = _by_name(images, [path for path in _files(images, nested) if path not in taken], image_suffix)
    names = sorted(found.keys() | maps.keys()) if listed is None else read_names(listed, found.keys() | maps.keys())
    return Pairs(names, _single(found, names, "a map"), _single(maps, names, "an image"))


def read_names(file: Path, known: set[str]) -> list[str]:
    """Return the names in a list, each once.

    A line is a name, with or without an image's ending, and may go on after a space, as with the class and species in
    the lists of Oxford-IIIT Pets; empty lines and those that begin with # are left aside.

    Args:
        file: the list.
        known: names of files; they decide where a line could be read in two ways.

    Raises:
        DataError: the list is missing or empty.
    """
    if not file.is_file():
        raise DataError(f"there is no list {file}; set data.lists and the names of the splits")
    names: dict[str, None] = {}
    for line in map(str.strip, read_text(file).splitlines()):
        if line and not line.startswith("#"):
            first = line.split()[0]
            candidates = [line, _stem(line), first, _stem(first)]
            names[next((name for name in candidates if name in known), first)] = None
    if not names:
        raise DataError(f"{file}: names no image")
    return list(names)


def _files(folder: Path, nested: bool) -> list[Path]:
    """Return the image files of a folder in order, without hidden ones: macOS puts ``._a.png`` beside ``a.png``."""
    paths = folder.rglob("*") if nested else folder.iterdir()
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _by_name(folder: Path, files: list[Path], suffix: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.stem.endswith(suffix):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name[: len(name) - len(suffix)], []).append(path)
    return found


def _single(found: Mapping[str, list[Path]], names: list[str], partner: str) -> dict[str, Path]:
    """Return the file of each name that has one, and refuse a second."""
    chosen = {name: found[name] for name in names if name in found}
    for first, *others in chosen.values():
        if others:
            raise DataError(f"{first} and {others[0].name} share a name, so {partner} cannot tell them apart")
    return {name: paths[0] for name, paths in chosen.items()}


def _stem(name: str) -> str:
    head, dot, ending = name.rpartition(".")
    return head if dot and f".{ending.lower()}" in SUFFIXES else name
