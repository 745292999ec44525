"""Where the files of a data set come from: archives that are fetched, or put there by hand, and unpacked."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from detseg.data.archive import extract
from detseg.data.check import DataError
from detseg.data.download import compare, fetch, split_checksum

log = logging.getLogger(__name__)


class Source(Protocol):
    """A step that puts part of a data set below its root."""

    def ready(self, root: Path) -> bool:
        """Say whether it has been done."""
        ...

    def provide(self, root: Path) -> None:
        """Do it; raise :class:`~detseg.data.check.DataError` in one line where that is impossible."""
        ...


class Archive:
    """An archive that is unpacked below the root.

    Args:
        gives: a path below the root that appears with it, whole; where it exists nothing is done.
        url: http or https address; ``None``: the publisher wants a login, so that a person has to fetch it.
        file: name of the archive, which is looked for in the root first; ``None``: the last part of the address.
        checksum: see :func:`~detseg.data.download.fetch`.
        take: the folder in the archive whose content is wanted; empty: all.
        into: folder below the root that it goes to.
        page: where a person finds the archive.

    Raises:
        ValueError: neither an address nor a file and a page, a checksum of another form, or a path that leads out of
            the root.
    """

    def __init__(
        self,
        *,
        gives: str,
        url: str | None = None,
        file: str | None = None,
        checksum: str | None = None,
        take: str = "",
        into: str = "",
        page: str | None = None,
    ) -> None:
        if url is None and (file is None or page is None):
            raise ValueError(f"Archive of {gives}: give url, or file and page for one that a person has to fetch")
        if checksum is not None:
            split_checksum(checksum)
        for path in (gives, take, into, file or ""):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"Archive of {gives}: {path!r} leads out of the root; give a path below it")
        if into and not PurePosixPath(gives).is_relative_to(into):
            raise ValueError(f"Archive of {gives}: it goes to {into}, so that what it gives lies below that")
        self.gives, self.url, self.checksum, self.take, self.into = gives, url, checksum, take, into
        self.file, self.page = file or PurePosixPath(urlsplit(url or "").path).name, page
        if not self.file:
            raise ValueError(f"Archive of {gives}: {url} ends in no name; give file")

    def ready(self, root: Path) -> bool:
        """Say whether what it gives is there."""
        return (root / self.gives).exists()

    def provide(self, root: Path) -> None:
        """Fetch the archive unless it lies in the root, unpack it, and remove it if it was fetched.

        Raises:
            DataError: a person has to fetch it, or it lacks what it should give.
            DownloadError, RefusedArchive: see :func:`~detseg.data.download.fetch`,
                :func:`~detseg.data.archive.extract`.
        """
        archive = root / self.file
        fetched = not archive.is_file()
        if not fetched:
            compare(archive, self.checksum)
        elif self.url is not None:
            log.info("fetching %s into %s", self.url, root)
            fetch(self.url, archive, checksum=self.checksum, page=self.page)
        else:
            raise DataError(
                f"{self.file} is not fetched, as its publisher wants a login: get it from {self.page}, put it at "
                f"{archive} and start again"
            )
        try:
            self._unpack(archive, root)
        except ValueError:
            if fetched:  # or it would be found again at the next start
                archive.unlink(missing_ok=True)
            raise
        if fetched:
            archive.unlink(missing_ok=True)

    def _unpack(self, archive: Path, root: Path) -> None:
        folder = Path(tempfile.mkdtemp(prefix=".unpack.", dir=root))
        try:
            content = extract(archive, folder / "content") / self.take
            given = PurePosixPath(self.gives).relative_to(self.into) if self.into else PurePosixPath(self.gives)
            if not (content / given).exists():
                raise DataError(f"archive {archive} has no {PurePosixPath(self.take, given)}; is it another release?")
            merge(content, root / self.into, last=given.parts[0])
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def merge(source: Path, target: Path, *, last: str = "") -> None:
    """Move what ``source`` holds into ``target``; what lies there already stays.

    Args:
        source: folder on the same disk; what is left of it does not matter.
        target: folder; made if missing.
        last: name that is moved after all others, so that its presence tells that they are there.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        place = target / entry.name
        if not place.exists():
            os.replace(entry, place)
        elif entry.is_dir() and place.is_dir():
            merge(entry, place)


def provide_all(sources: Sequence[Source], root: Path) -> None:
    """Let every source that is not ready provide its part; other processes wait, and find all done."""
    if all(source.ready(root) for source in sources):
        return
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        for left in root.glob(".unpack.*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for source in sources:
            if not source.ready(root):
                source.provide(root)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold a lock on ``root``."""
    with (root / ".detseg.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
