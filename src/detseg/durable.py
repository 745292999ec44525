"""Checkpoints with their checksum inside, and the newest valid one found.

A sealed checkpoint is the zip file that ``torch.save`` writes, so plain ``torch.load`` reads it. Its zip comment holds
the step, the time of writing and the SHA-256 of every byte before it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from detseg.atomic import BLOCK, Sink, WriteFailed, link_or_copy, replace, sweep, write_atomic

__all__ = [
    "Damaged",
    "Seal",
    "WriteFailed",
    "check_seal",
    "link_or_copy",
    "newest_valid",
    "read_sealed",
    "sweep",
    "write_atomic",
    "write_sealed",
]

log = logging.getLogger(__name__)

MARK = b"detseg-seal-1 "
SEAL = re.compile(rb"detseg-seal-1 step=(\d{20}) time=(\d{20}) sha256=([0-9a-f]{64})")
SEAL_SIZE = len(MARK) + len("step= time= sha256=") + 20 + 20 + 64
"""Bytes of the zip comment; always the same, so that it is found from the end of the file."""
ZIP_END = b"PK\x05\x06"  # APPNOTE.TXT 4.3.16, end of central directory record
ZIP_END_SIZE = 22  # without a comment, whose size is the record's last two bytes


class Damaged(ValueError):
    """A file is not what was written: cut short, altered or empty. The message is one line and names it."""


@dataclass(frozen=True, order=True)
class Seal:
    """What a sealed file says about itself; a later one is greater.

    Attributes:
        step: optimiser steps taken.
        time: nanoseconds since 1970 when it was written.
    """

    step: int
    time: int


def write_sealed(content: Any, path: str | Path, *, previous: str | Path | None = None) -> int:
    """Write a checkpoint with its seal, so that a reader finds all of it or what was there before.

    Args:
        content: what ``torch.save`` takes; its ``"global_step"``, where it has one, orders it among others.
        path: the file; its directory is made.
        previous: where the file that ``path`` replaces is kept, in the same directory; ``None``: it is given up.

    Returns:
        The file's size in bytes.

    Raises:
        WriteFailed: the disk is full, read-only or broken.
    """
    import torch

    step = content.get("global_step", 0) if isinstance(content, Mapping) else 0

    def fill(file: IO[bytes]) -> int:
        sink = _Sealing(file)
        torch.save(content, cast(IO[bytes], sink))
        return sink.finish(step=int(step), now=time.time_ns())

    return replace(Path(path), fill, previous=None if previous is None else Path(previous))


def check_seal(path: str | Path) -> Seal | None:
    """Compare a file with its seal.

    Returns:
        What the seal says, or ``None`` where the file has none: torchvision's weights, say, or another program's.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: the file is empty, cut short, or differs from what was sealed by as little as one bit.
    """
    with Path(path).open("rb") as file:
        return _check(file, path)


def read_sealed(path: str | Path, *, map_location: Any = "cpu") -> Any:
    """Read a file of torch's with ``weights_only=True`` after comparing it with its seal, where it has one.

    Both look at one opened file, so that nothing can be put in its place between.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it differs from what was sealed, or is empty or cut short.
        Exception: whatever torch says of a file without a seal that it cannot read.
    """
    import torch

    with Path(path).open("rb") as file:
        _check(file, path)
        file.seek(0)
        return torch.load(file, map_location=map_location, weights_only=True)


def newest_valid(directory: str | Path, *, pattern: str = "*.ckpt") -> Path | None:
    """Return the checkpoint of the most steps, of the latest writing among equals, that is as it was written.

    Each that is not is named in a warning. What a killed writer left behind is removed. Files without a seal, as older
    versions wrote them, come after all others, by their time of change.

    Args:
        directory: with the files; those of its subdirectories do not count.
        pattern: of their names.

    Returns:
        The file, or ``None`` where none is valid.
    """
    directory = Path(directory)
    sweep(directory)
    found: list[tuple[Seal, Path]] = []
    for path in sorted(directory.glob(pattern)):
        try:
            found.append((_age(path), path))
        except (Damaged, OSError) as error:
            log.warning("passed over: %s", error)
    return max(found)[1] if found else None


def _age(path: Path) -> Seal:
    """Return where a file stands among others; without a seal, before all that have one."""
    seal = check_seal(path)
    if seal is not None:
        return seal
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except zipfile.BadZipFile as error:
        raise Damaged(f"{path} is no checkpoint: {error}") from error
    if wrong is not None:
        raise Damaged(f"{path} is damaged: its part {wrong} differs from its checksum")
    return Seal(step=-1, time=path.stat().st_mtime_ns)


def _check(file: IO[bytes], path: str | Path) -> Seal | None:
    """Compare an opened file with its seal; see ``check_seal``."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise Damaged(f"{path} is empty (0 bytes): its writing was broken off, or the disk was full")
    file.seek(0)
    start = file.read(4)
    file.seek(max(0, size - SEAL_SIZE - ZIP_END_SIZE))
    tail = file.read()
    match = SEAL.fullmatch(tail[-SEAL_SIZE:])
    if match is None:
        whole = tail[-ZIP_END_SIZE:].startswith(ZIP_END) and MARK not in tail
        if whole or (start != b"PK\x03\x04" and MARK not in tail):  # a zip file without a comment, or none at all
            return None
        raise Damaged(
            f"{path} is damaged: it starts as a checkpoint does, and its end is cut off or altered ({size} bytes)"
        )
    digest = _digest(file, size - SEAL_SIZE, match.group()[:-64])
    if digest != match[3].decode():
        told = f"SHA-256 {digest[:12]}..., sealed with {match[3].decode()[:12]}..."
        raise Damaged(f"{path} is damaged: it is not what was written ({told}, {size} bytes)")
    return Seal(step=int(match[1]), time=int(match[2]))


def _digest(file: IO[bytes], count: int, rest: bytes) -> str:
    """Return the SHA-256 of the first ``count`` bytes of ``file`` and of ``rest``."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    file.seek(0)
    while count > 0:
        read = file.readinto(block[: min(BLOCK, count)])  # type: ignore[attr-defined]  # IO[bytes] lacks it, files do not
        if not read:
            break
        digest.update(block[:read])
        count -= read
    digest.update(rest)
    return digest.hexdigest()


class _Sealing(Sink):
    """Hashes what is written, and holds the zip's last record back until the seal is known."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()
        self.tail = b""

    def write(self, data: Any) -> int:
        """Write all but the last bytes so far."""
        view = memoryview(data).cast("B")
        if len(view) >= ZIP_END_SIZE:
            self._hashed(memoryview(self.tail))
            self._hashed(view[:-ZIP_END_SIZE])
            self.tail = bytes(view[-ZIP_END_SIZE:])
        else:
            joined = self.tail + bytes(view)
            self._hashed(memoryview(joined)[:-ZIP_END_SIZE])
            self.tail = joined[-ZIP_END_SIZE:]
        return len(view)

    def finish(self, *, step: int, now: int) -> int:
        """Write the record with the seal as its comment; return the file's size."""
        if not self.tail.startswith(ZIP_END):
            raise RuntimeError("torch.save wrote no zip file with its directory last; this version of torch is unknown")
        self._hashed(memoryview(self.tail[:-2] + struct.pack("<H", SEAL_SIZE)))
        self._hashed(memoryview(MARK + b"step=%020d time=%020d sha256=" % (step, now)))
        self._emit(memoryview(self.digest.hexdigest().encode()))
        return self.close()

    def _hashed(self, view: memoryview) -> None:
        self.digest.update(view)
        self._emit(view)
