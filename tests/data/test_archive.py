"""Unpacking: what is in comes out, attacks are refused in one line, and a refused archive leaves nothing anywhere."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from detseg.data.archive import Limits, RefusedArchive, extract

MIB = 2**20


def write_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content, compress_type=zipfile.ZIP_DEFLATED)
    return path


def write_tar(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    suffix = {".gz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{suffix}") as file:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def tar_entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o644) << 16
    return info


def files_below(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


CONTENT = {"a.txt": b"one", "images/x.jpg": bytes(range(256)) * 40, "images/deep/empty": b""}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "named_wrongly.dat"])
def test_what_is_in_comes_out(tmp_path: Path, name: str):
    write = write_tar if ".tar" in name else write_zip
    archive = write(tmp_path / name, *CONTENT.items())
    out = extract(archive, tmp_path / "new" / "data")
    assert out == tmp_path / "new" / "data" and files_below(out) == CONTENT
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    assert out.stat().st_mode & 0o755 == 0o755


def test_directories_and_a_leading_dot(tmp_path: Path):
    archive = write_tar(
        tmp_path / "x.tar",
        (tar_entry("./", tarfile.DIRTYPE), b""),
        (tar_entry("./images", tarfile.DIRTYPE), b""),
        (tar_entry("./images", tarfile.DIRTYPE), b""),
        ("./images/a.jpg", b"a"),
    )
    out = extract(archive, tmp_path / "out")
    assert files_below(out) == {"images/a.jpg": b"a"}
    zipped = write_zip(tmp_path / "x.zip", ("images/", b""), ("images/a.jpg", b"a"))
    assert files_below(extract(zipped, tmp_path / "other")) == {"images/a.jpg": b"a"}


def test_permissions_are_not_taken_over(tmp_path: Path):
    info = tar_entry("run.sh", tarfile.REGTYPE)
    info.mode = 0o6777
    out = extract(write_tar(tmp_path / "x.tar", (info, b"#!/bin/sh")), tmp_path / "out")
    mode = (out / "run.sh").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID) and not mode & 0o111


def escape_name(tmp_path: Path) -> str:
    return str(tmp_path / "canary")


ATTACKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip ..": (lambda p: write_zip(p / "x.zip", ("ok", b"1"), ("../canary", b"x")), "leads out"),
    "zip inner ..": (lambda p: write_zip(p / "x.zip", ("a/../../canary", b"x")), "leads out"),
    "zip backslash": (lambda p: write_zip(p / "x.zip", ("..\\canary", b"x")), "leads out"),
    "zip absolute": (lambda p: write_zip(p / "x.zip", (escape_name(p), b"x")), "absolute"),
    "zip drive": (lambda p: write_zip(p / "x.zip", ("C:\\canary", b"x")), "absolute"),
    "zip symlink": (lambda p: write_zip(p / "x.zip", (zip_entry("l", stat.S_IFLNK), b"..")), "symbolic link"),
    "zip pipe": (lambda p: write_zip(p / "x.zip", (zip_entry("l", stat.S_IFIFO), b"")), "a pipe"),
    "zip device": (lambda p: write_zip(p / "x.zip", (zip_entry("l", stat.S_IFCHR), b"")), "a device"),
    "zip bomb": (lambda p: write_zip(p / "x.zip", ("b", bytes(70 * MIB))), "size bomb"),
    "zip twice": (lambda p: write_zip(p / "x.zip", ("Labels", b"1"), ("labels", b"2")), "twice"),
    "zip file and directory": (lambda p: write_zip(p / "x.zip", ("a", b"1"), ("a/b", b"2")), "a file and a directory"),
    "tar ..": (lambda p: write_tar(p / "x.tar", ("ok", b"1"), ("../canary", b"x")), "leads out"),
    "tar absolute": (lambda p: write_tar(p / "x.tar", (escape_name(p), b"x")), "absolute"),
    "tar symlink out": (
        lambda p: write_tar(p / "x.tar", (tar_entry("l", tarfile.SYMTYPE, ".."), b""), ("l/canary", b"x")),
        "symbolic link",
    ),
    "tar hard link": (
        lambda p: write_tar(p / "x.tar", (tar_entry("l", tarfile.LNKTYPE, "/etc/hosts"), b"")),
        "hard link",
    ),
    "tar device": (lambda p: write_tar(p / "x.tar", (tar_entry("l", tarfile.CHRTYPE), b"")), "a device"),
    "tar block device": (lambda p: write_tar(p / "x.tar", (tar_entry("l", tarfile.BLKTYPE), b"")), "a device"),
    "tar pipe": (lambda p: write_tar(p / "x.tar", (tar_entry("l", tarfile.FIFOTYPE), b"")), "a pipe"),
    "tar bomb": (lambda p: write_tar(p / "x.tar.gz", ("ok", b"1"), ("b", bytes(70 * MIB))), "size bomb"),
    "tar control characters": (lambda p: write_tar(p / "x.tar", ("a\x1b[2Jb", b"x")), "no name of a file"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_and_leave_nothing(tmp_path: Path, attack: str):
    place = tmp_path / "place"
    place.mkdir()
    make, said = ATTACKS[attack]
    archive = make(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(RefusedArchive, match=said) as caught:
        extract(archive, place / "out")
    assert sorted(place.rglob("*")) == before and not (tmp_path / "canary").exists()
    assert "\n" not in str(caught.value) and archive.name in str(caught.value)


def test_sizes_are_counted_not_believed(tmp_path: Path):
    """The table of contents says 10 bytes, the stream holds 100 000."""
    archive = write_zip(tmp_path / "x.zip", ("a", bytes(100_000)))
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"refused|damaged"):
        extract(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("limits", [Limits(total=2), Limits(members=1)])
def test_limits_are_the_users(tmp_path: Path, limits: Limits):
    archive = write_zip(tmp_path / "x.zip", ("a", b"12"), ("b", b"3"))
    with pytest.raises(RefusedArchive, match="larger limits"):
        extract(archive, tmp_path / "out", limits=limits)
    assert len(files_below(extract(archive, tmp_path / "out", limits=Limits(total=3, members=2)))) == 2


def test_a_large_ratio_may_be_asked_for(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", ("zeros", bytes(70 * MIB)))
    out = extract(archive, tmp_path / "out", limits=Limits(ratio=5000))
    assert (out / "zeros").stat().st_size == 70 * MIB


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut", b"\x1f\x8b\x08 cut"])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.zip") as caught:
        extract(tmp_path / "x.zip", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, name: str):
    write = write_tar if ".tar" in name else write_zip
    archive = write(tmp_path / name, ("a", os.urandom(200_000)), ("b", os.urandom(200_000)))
    raw = bytearray(archive.read_bytes())
    raw[100_000:100_040] = bytes(40)
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        extract(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_overwritten_and_missing_is_said(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", ("a", b"1"))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        extract(archive, tmp_path / "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        extract(archive, tmp_path / "dangling")
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip does not exist"):
        extract(tmp_path / "nothing.zip", tmp_path / "new")
