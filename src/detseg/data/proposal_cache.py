"""Proposals on disk: one file per image, found by the image's pixels and by all that its maker depends on.

They lie beside the data set, in ``<root>/.detseg/proposals/<maker>/``; where there is no folder, or one that may not be
written, below the folders of ``detseg.data.cache``. Files appear whole or not at all, so that any number of runs may
fill and read one folder at once, and what was made before a kill stays made. Each holds the version of its format and a
checksum; one that is damaged, or of another version, counts as absent and says so in one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detseg.atomic import WriteFailed, write_atomic
from detseg.data import cache

FORMAT = 1
"""Raised whenever the files change, so that older ones are not found, and not read where they are."""

MAGIC = b"detseg boxes\n"
HEAD = struct.Struct("<13sHBI16s")  # magic, format, kind of number, boxes, checksum
WHOLE, REAL = 0, 1  # kinds of number: uint16 and float32

log = logging.getLogger(__name__)


class ProposalCache:
    """The files of one maker of proposals.

    Args:
        key: the maker's ``key``: everything but the image that its boxes depend on.
        root: folder of the data set; ``None`` where it has none.
    """

    def __init__(self, *, key: str, root: Path | None = None) -> None:
        self.key = key
        name = hashlib.blake2b(f"{FORMAT} {key}".encode(), digest_size=10).hexdigest()
        folders = [folder / "proposals" / name for folder in cache.folders()]
        self.places = folders if root is None else [root / ".detseg" / "proposals" / name, *folders]

    def read(self, digest: str) -> Tensor | None:
        """Return the boxes ``(N, 4)`` float32 of the image with this ``digest``, or ``None`` where none are kept."""
        for place in self.places:
            path = place / _name(digest)
            try:
                return decode(path.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                log.warning("%s: %s; the proposals are made again", path, error)
        return None

    def write(self, digest: str, boxes: Tensor) -> Path | None:
        """Keep boxes ``(N, 4)``; return their file, or ``None`` where nothing can be written."""
        return self._write(_name(digest), encode(boxes))

    def read_split(self, identity: str, images: int) -> list[str] | None:
        """Return the digest of each image of a split that was filled to its end, or ``None``.

        Args:
            identity: of the split, see ``write_split``.
            images: how many there must be.
        """
        for place in self.places:
            path = place / "splits" / f"{identity}.json"
            try:
                content = json.loads(path.read_bytes())
                digests = [str(digest) for digest in content["digests"]]
                if content["format"] != FORMAT or len(digests) != images or content["checksum"] != _sum(digests):
                    raise ValueError("damaged, or of another version")
                return digests
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: %s; the proposals of the split are looked through again", path, error)
        return None

    def write_split(self, identity: str, digests: Sequence[str]) -> Path | None:
        """Note that all proposals of a split are kept; return the note, or ``None`` where nothing can be written.

        Args:
            identity: a name that is another one as soon as an image changes.
            digests: one per image.
        """
        content = {"format": FORMAT, "checksum": _sum(digests), "digests": list(digests)}
        return self._write(f"splits/{identity}.json", json.dumps(content).encode())

    def _write(self, name: str, raw: bytes) -> Path | None:
        for place in self.places:
            if not may_write(place):
                continue
            try:
                if not (place / "maker.txt").exists():  # for people who wonder
                    write_atomic(place / "maker.txt", f"{self.key}\n")
                write_atomic(place / name, raw)
            except WriteFailed as error:
                log.warning("%s", str(error).partition(". Earlier")[0])
                continue
            return place / name
        return None


def digest_of(image: Tensor) -> str:
    """Return 32 hex digits that name the pixels of an image ``(3, H, W)`` uint8, whatever their order in memory."""
    pixels = np.ascontiguousarray(image.as_subclass(Tensor).permute(1, 2, 0).numpy())  # (H, W, 3)
    return hashlib.blake2b(pixels.data, digest_size=16, person=b"%dx%d" % pixels.shape[:2]).hexdigest()


def encode(boxes: Tensor) -> bytes:
    """Return boxes ``(N, 4)`` as the content of a file: 16 bits a number where that is exact, and compressed.

    Raises:
        ValueError: they are no boxes, or not finite.
    """
    values = boxes.detach().cpu().numpy().astype(np.float32)
    if values.ndim != 2 or values.shape[1] != 4 or not np.isfinite(values).all():
        raise ValueError(f"proposals must be finite boxes (N, 4), got {tuple(boxes.shape)}")
    whole = values.clip(0, 65535).astype("<u2")  # (N, 4)
    kind, exact = (WHOLE, whole) if np.array_equal(whole, values) else (REAL, values.astype("<f4"))
    columns = np.ascontiguousarray(exact.T)  # (4, N)
    planes = columns.view(np.uint8).reshape(4, len(values), exact.itemsize).transpose(0, 2, 1)  # like bytes together
    payload = zlib.compress(planes.tobytes(), 6)
    return HEAD.pack(MAGIC, FORMAT, kind, len(values), _checksum(kind, len(values), payload)) + payload


def decode(raw: bytes) -> Tensor:
    """Return the boxes ``(N, 4)`` float32 of a file's content.

    Raises:
        ValueError: it is cut short, damaged, of another version or no such file.
    """
    if len(raw) < HEAD.size:
        raise ValueError(f"cut short: {len(raw)} bytes")
    magic, version, kind, count, checksum = HEAD.unpack_from(raw)
    payload = raw[HEAD.size :]
    if magic != MAGIC:
        raise ValueError("no file of proposals")
    if version != FORMAT:
        raise ValueError(f"of format {version}, not {FORMAT}")
    if checksum != _checksum(kind, count, payload):
        raise ValueError("damaged: its checksum is wrong")
    number = np.dtype("<u2" if kind == WHOLE else "<f4")
    planes = np.frombuffer(zlib.decompress(payload), dtype=np.uint8).reshape(4, number.itemsize, count)
    columns = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(number).reshape(4, count)
    return torch.from_numpy(columns.T.astype(np.float32, order="C"))  # (N, 4)


def may_write(folder: Path) -> bool:
    """Say whether files may be made in ``folder``, or where it is missing in the one that it would be made in.

    A folder without any permission to write is left alone by root too.
    """
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if there is None or not there.is_dir():
        return False
    return os.access(there, os.W_OK | os.X_OK) and bool(there.stat().st_mode & 0o222)


def _name(digest: str) -> str:
    return f"{digest[:2]}/{digest}.boxes"


def _checksum(kind: int, count: int, payload: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<BI", kind, count) + payload, digest_size=16).digest()


def _sum(digests: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
