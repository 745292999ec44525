"""Unpacking archives of data sets that came from elsewhere: all of it below one directory, or nothing at all.

The whole table of contents is checked first, then everything is unpacked beside the destination and renamed, so that a
refused or damaged archive leaves no file behind. Only files and directories are unpacked, with plain permissions.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

GIB = 2**30
CHUNK = 2**20
ANY_RATIO = 64 * 2**20
"""Bytes that an archive may unpack to whatever its size: tables of zeros compress a thousandfold and are harmless."""

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class RefusedArchive(ValueError):
    """An archive would write outside its directory, more than it may, or something else than files."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        total: bytes unpacked, over all files.
        ratio: bytes unpacked per byte of the archive; photos are near 1, text near 10. Below 64 MiB nothing is asked.
        members: files and directories.
    """

    total: int = 512 * GIB
    ratio: float = 200.0
    members: int = 5_000_000


@dataclass(frozen=True)
class Member:
    """A file or directory in an archive: its checked path, and its size in bytes as the archive says."""

    path: PurePosixPath
    size: int
    directory: bool
    entry: zipfile.ZipInfo | tarfile.TarInfo


def extract(archive: str | Path, destination: str | Path, *, limits: Limits | None = None) -> Path:
    """Unpack a zip or tar file (plain, gzip, bzip2 or xz) into a directory that does not exist yet.

    Args:
        archive: the file.
        destination: directory that appears whole, or not at all.
        limits: default: ``Limits()``.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: there is no such archive.
        FileExistsError: ``destination`` exists.
        RefusedArchive: a path is absolute or leads out by ``..``, a member is a link, a device or a pipe, is encrypted
            or stands there twice, or there is more than ``limits`` allow; one line, with the member's name.
        ValueError: it is no archive, or damaged.
    """
    archive, destination = Path(archive), Path(destination)
    if not archive.is_file():
        raise FileNotFoundError(f"archive {archive} does not exist (looked from {Path.cwd()})")
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists already; name a directory that does not, or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        _extract(archive, beside, limits or Limits())
        beside.chmod(0o755)  # mkdtemp's is for one user
        os.replace(beside, destination)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; gzip's and bzip2's have no number
            raise
        raise ValueError(f"archive {archive} is damaged or of a kind that is not read: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return destination


def _extract(archive: Path, directory: Path, limits: Limits) -> None:
    """Check every member, then write them below ``directory``, which is empty."""
    budget = min(limits.total, max(ANY_RATIO, int(limits.ratio * archive.stat().st_size)))
    with _opened(archive) as opened:
        members = list(_checked(archive, opened, limits, budget))
        left = budget
        for member in members:
            target = directory.joinpath(*member.path.parts)
            if member.directory:
                target.mkdir(parents=True, exist_ok=True)
                continue
            what = f"archive {archive}: {member.path}"
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with _content(opened, member) as content, target.open("xb") as file:
                    left -= _copy(content, file, left, what)
            except (FileExistsError, NotADirectoryError) as error:
                raise RefusedArchive(f"{what} is refused: it is a file and a directory") from error
        if isinstance(opened, tarfile.TarFile) and opened.fileobj is not None:
            _drain(opened.fileobj, left + CHUNK, f"archive {archive}")


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """Open a zip or tar file by what it holds, whatever it is called."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield opened
        return
    try:
        tar = tarfile.open(archive)  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is no zip or tar file, or is cut short ({str(error).splitlines()[0]})") from error
    with tar:
        yield tar


def _checked(archive: Path, opened: zipfile.ZipFile | tarfile.TarFile, limits: Limits, budget: int) -> Iterator[Member]:
    """Yield the members; refuse the archive at the first that is not a harmless file or directory."""
    seen: dict[str, bool] = {}
    total = 0
    entries = opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened  # a tar file is read as it goes
    for entry in entries:
        member = _zip_member(archive, entry) if isinstance(entry, zipfile.ZipInfo) else _tar_member(archive, entry)
        if not member.path.parts:  # "./", with which tar files often begin
            continue
        total += member.size
        if total > budget or len(seen) >= limits.members:
            raise RefusedArchive(_too_much(f"archive {archive}", budget, limits.members))
        key = str(member.path).casefold()  # some file systems do not tell a from A
        if key in seen and not (member.directory and seen[key]):
            raise RefusedArchive(f"archive {archive} is refused: {member.path} stands in it twice")
        seen[key] = member.directory
        yield member


def _too_much(what: str, budget: int, members: int) -> str:
    return (
        f"{what} is refused: it unpacks to more than {budget / GIB:.3g} GiB or {members} members, as a size bomb does; "
        "if it is meant to, give larger limits"
    )


def _zip_member(archive: Path, entry: zipfile.ZipInfo) -> Member:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise RefusedArchive(f"archive {archive} is refused: {entry.filename!r} is {_name(kind)}, not a file")
    if entry.flag_bits & 1:
        raise RefusedArchive(f"archive {archive} is refused: {entry.filename!r} is encrypted")
    return Member(_path(archive, entry.filename), entry.file_size, entry.is_dir(), entry)


def _tar_member(archive: Path, entry: tarfile.TarInfo) -> Member:
    if not (entry.isreg() or entry.isdir()):
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe"}
        kind = kinds.get(entry.type, "a device" if entry.isdev() else "of an unknown kind")
        raise RefusedArchive(f"archive {archive} is refused: {entry.name!r} is {kind}, not a file")
    return Member(_path(archive, entry.name), entry.size, entry.isdir(), entry)


def _name(kind: int) -> str:
    """Return in words what a file mode says."""
    return {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(kind, "a device")


def _path(archive: Path, name: str) -> PurePosixPath:
    """Return the path of a member; refuse one that could lie elsewhere, also on Windows."""
    path, windows = PurePosixPath(name.replace("\\", "/")), PureWindowsPath(name)
    if path.is_absolute() or windows.drive or windows.root:
        raise RefusedArchive(f"archive {archive} is refused: {name!r} is an absolute path")
    if ".." in path.parts:
        raise RefusedArchive(f"archive {archive} is refused: {name!r} leads out of the directory by '..'")
    if any(ord(letter) < 32 for letter in name) or len(name) > 1024:
        raise RefusedArchive(f"archive {archive} is refused: {name[:80]!r} is no name of a file")
    return path


def _content(opened: zipfile.ZipFile | tarfile.TarFile, member: Member) -> IO[bytes]:
    """Open a member for reading."""
    if isinstance(opened, zipfile.ZipFile):
        assert isinstance(member.entry, zipfile.ZipInfo)
        return opened.open(member.entry)
    assert isinstance(member.entry, tarfile.TarInfo)
    content = opened.extractfile(member.entry)
    assert content is not None, f"{member.path} is a file"
    return content


def _drain(stream: Any, left: int, what: str) -> None:
    """Read on to the end of a compressed stream, where its checksum is compared; zip files do so per member."""
    while chunk := stream.read(CHUNK):
        left -= len(chunk)
        if left < 0:
            raise RefusedArchive(f"{what} is refused: much follows after its end")


def _copy(content: IO[bytes], file: IO[bytes], left: int, what: str) -> int:
    """Copy and return the number of bytes; what the archive says about sizes is not believed."""
    written = 0
    while chunk := content.read(CHUNK):
        written += len(chunk)
        if written > left:
            raise RefusedArchive(f"{what} is refused: it unpacks to more than the archive says and may hold")
        file.write(chunk)
    return written
