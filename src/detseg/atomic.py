"""Files that are whole or not there: written under another name in their own directory, synced and renamed.

In their own directory, as a rename across file systems is a copy, and half a copy is half a checkpoint. While a file is
written its writer holds a lock on it, so that any process can tell what a killed writer left behind from what is being
written, without asking which process ids are alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PART = re.compile(r"^\..+\.[0-9a-f]{8}\.part$")
BLOCK = 1 << 22  # bytes copied at a time


class WriteFailed(OSError):
    """A file could not be written, and what lay there before is as it was. The message says why and what is free."""


def write_atomic(path: str | Path, data: bytes | str) -> int:
    """Write ``data`` (text as UTF-8) so that a reader finds all of it or what was there before; return its size.

    Raises:
        WriteFailed: the disk is full, read-only or broken.
    """
    raw = data.encode() if isinstance(data, str) else data

    def fill(file: IO[bytes]) -> int:
        sink = Sink(file)
        sink.write(raw)
        return sink.close()

    return replace(Path(path), fill)


def link_or_copy(source: str | Path, target: str | Path, *, previous: str | Path | None = None) -> None:
    """Let ``target`` be the same file as ``source``, in one step: a hard link, or a copy where there are no links.

    Args:
        source: a file that is replaced as a whole when it changes, as all are that this module writes.
        target: what is replaced.
        previous: see ``write_sealed``.

    Raises:
        WriteFailed: the disk is full, read-only or broken.
    """
    source, target = Path(source), Path(target)
    kept = None if previous is None else Path(previous)
    if target.exists() and source.samefile(target):
        return
    with source.open("rb") as opened, _explained(target, lambda: source.stat().st_size):
        _lock(opened.fileno(), fcntl.LOCK_SH)  # the new name is no orphan
        temporary = _part_name(target)
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            temporary.unlink(missing_ok=True)
            replace(target, lambda file: _copy(opened, file), previous=kept)
            return
        _put(temporary, target, kept)


def sweep(directory: str | Path) -> list[Path]:
    """Remove what killed writers left in ``directory``; return what was removed.

    Files that someone is writing now are locked and stay. Where a file cannot be locked or removed it stays too.
    """
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for entry in sorted(Path(directory).iterdir()):
            if PART.match(entry.name) and _abandoned(entry):
                with contextlib.suppress(OSError):
                    entry.unlink()
                    removed.append(entry)
    return removed


class Sink:
    """What ``torch.save`` and copies write to: a failing disk is remembered instead of raised.

    Torch would go on after an error and hide it behind one of its own; so the rest is counted alone, which tells how
    much space the whole file needs.

    Args:
        file: opened for writing, unbuffered.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = 0
        self.failure: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write bytes or a buffer; return how many there were."""
        view = memoryview(data).cast("B")
        self._emit(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: the file is unbuffered, and synced in the end."""

    def close(self) -> int:
        """Raise what went wrong, or return the number of bytes."""
        if self.failure is not None:
            raise _Failure(self.size) from self.failure
        return self.size

    def _emit(self, view: memoryview) -> None:
        self.size += len(view)
        while self.failure is None and len(view):
            try:
                view = view[self.file.write(view) :]
            except BaseException as error:
                self.failure = error


class _Failure(Exception):
    """Carries how many bytes a file would have had; its cause is the reason."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def replace(path: Path, fill: Callable[[IO[bytes]], int], *, previous: Path | None = None) -> int:
    """Put what ``fill`` writes at ``path``; return what it returns."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with _part(path) as (file, temporary):
            size = fill(file)
            os.fsync(file.fileno())
            _put(temporary, path, previous)
    return size


def _put(temporary: Path, path: Path, previous: Path | None) -> None:
    """Rename a finished file to ``path``, where there is always one; what was there gets the name ``previous``."""
    try:
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # also where both names were one file already: then a rename does nothing
    _sync_directory(path.parent)


def _keep(path: Path, previous: Path) -> None:
    spare = _part_name(previous)
    try:
        with path.open("rb") as opened:
            _lock(opened.fileno(), fcntl.LOCK_SH)
            os.link(path, spare)
            os.replace(spare, previous)
    except OSError:  # a file system without links: for a moment the previous one alone is there
        os.replace(path, previous)
    finally:
        spare.unlink(missing_ok=True)


@contextmanager
def _part(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a locked file under another name beside ``path``; it is gone afterwards, unless it was renamed."""
    while True:
        temporary = _part_name(path)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0) as file:
            _lock(file.fileno(), fcntl.LOCK_EX)
            if not temporary.exists():  # swept between its making and the lock
                continue
            try:
                yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)
            return


@contextmanager
def _explained(path: Path, size: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what a disk says into one line with the path, the space needed and the space that is free."""
    try:
        yield
    except (OSError, _Failure) as error:
        if isinstance(error, WriteFailed):
            raise
        cause = error.__cause__ if isinstance(error, _Failure) else error
        if not isinstance(cause, OSError):  # such as a second Ctrl-C
            raise cause or error from None
        needed = error.size if isinstance(error, _Failure) else (size() if size else None)
        told = WriteFailed(_told(path, cause, needed))
        told.errno = cause.errno
        raise told from cause


def _told(path: Path, cause: OSError, needed: int | None) -> str:
    place = next((parent for parent in (path.parent, *path.parents) if parent.exists()), Path("/"))
    free = f"{shutil.disk_usage(place).free / 1e6:.1f} MB are free in {place}"
    room = f"{needed / 1e6:.1f} MB are needed, {free}" if needed is not None else free
    return (
        f"{path} could not be written: {os.strerror(cause.errno) if cause.errno else cause}; {room}. Earlier files are "
        "as they were; make room or give another directory, then go on with resume=<run directory>"
    )


def _copy(source: IO[bytes], target: IO[bytes]) -> int:
    sink = Sink(target)
    source.seek(0)
    while block := source.read(BLOCK):
        sink.write(block)
    return sink.close()


def _part_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _lock(descriptor: int, kind: int) -> None:
    """Lock an opened file; where the file system knows no locks, a sweep cannot lock either and removes nothing."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, kind)


def _abandoned(path: Path) -> bool:
    """Say whether nobody is writing a file."""
    try:
        with path.open("r+b") as file:  # NFS locks nothing that is open for reading alone
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` as durable as the files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
