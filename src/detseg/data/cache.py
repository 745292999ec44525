"""Checked stores kept between runs, found again by the content of the annotation files.

They lie in ``$DETSEG_CACHE``, else ``$XDG_CACHE_HOME/detseg``, else ``~/.cache/detseg``, else the system's temporary
folder; where none can be written the check simply runs again. A file appears whole or not at all, so several
processes may write the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from detseg.data.check import Report
from detseg.data.store import AnnotationStore

FORMAT = 3
"""Raised whenever a store, or what the check does, changes, so that older files are not found."""

log = logging.getLogger(__name__)


def fingerprint(*, options: str, contents: Iterable[Path], folders: Iterable[Path]) -> str:
    """Return a key that changes with whatever a check depends on.

    Args:
        options: the reader's name and settings as text.
        contents: annotation files, hashed byte by byte; one that is missing counts as missing.
        folders: of images and maps; names, byte counts and times of change of the files in them are hashed, not the
            pixels.
    """
    digest = hashlib.blake2b(f"{FORMAT} {options}".encode(), digest_size=20)
    for path in contents:
        digest.update(f"\0{path}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            state = path.stat()
            digest.update(f"\0{path}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def load(key: str) -> tuple[AnnotationStore, Report] | None:
    """Return the store and report kept under ``key``, or ``None``; a file that cannot be read counts as absent."""
    for folder in folders():
        path = folder / f"{key}.npz"
        if not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            report = Report.from_json(arrays.pop("report").tobytes().decode())
            return AnnotationStore.from_arrays(arrays), report
        except Exception as error:  # whatever is wrong with a cached file, checking again repairs it
            log.info("cached annotations in %s cannot be read (%s); the check runs again", path, error)
    return None


def save(key: str, store: AnnotationStore, report: Report) -> Path | None:
    """Keep a store and its report under ``key``; return the file, or ``None`` where nothing can be written."""
    text = np.frombuffer(report.to_json().encode(), dtype=np.uint8)
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        except OSError:
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, report=text, **store.arrays())  # type: ignore[arg-type]  # stub: names could be allow_pickle
            os.replace(name, folder / f"{key}.npz")
            return folder / f"{key}.npz"
        except OSError as error:  # such as a full disk
            log.info("annotations could not be kept in %s (%s)", folder, error)
            with contextlib.suppress(OSError):
                os.unlink(name)
    return None


def folders() -> Iterator[Path]:
    """Yield the folders in which files are kept between runs, best first; none need exist."""
    if os.environ.get("DETSEG_CACHE"):
        yield Path(os.environ["DETSEG_CACHE"])
        return
    with contextlib.suppress(RuntimeError):  # no home folder
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detseg"
    yield Path(tempfile.gettempdir()) / f"detseg-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
