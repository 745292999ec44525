"""Archives of data sets: fetched or put there by hand, unpacked below the root whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from detseg.data.check import DataError
from detseg.data.download import DownloadError
from detseg.data.source import Archive, merge, provide_all
from file_server import Site, serving

PHOTOS = {"set-1/images/a.jpg": b"a", "set-1/images/deep/b.jpg": b"b", "set-1/README": b"one", "notes.txt": b"outside"}
MASKS = {"set-1/masks/a.png": b"m", "set-1/README": b"two"}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        served.files = {"/photos.zip": zipped(PHOTOS), "/masks.tgz": tarred(MASKS)}
        yield served


def zipped(content: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, body in content.items():
            file.writestr(name, body)
    return data.getvalue()


def tarred(content: dict[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        for name, body in content.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(body)
            file.addfile(info, io.BytesIO(body))
    return data.getvalue()


def files_below(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


def both(site: Site) -> list[Archive]:
    return [
        Archive(gives="images", url=f"{site.url}/photos.zip", take="set-1"),
        Archive(gives="masks", url=f"{site.url}/masks.tgz", take="set-1"),
    ]


def test_archives_share_a_root(tmp_path: Path, site: Site):
    root = tmp_path / "new" / "set"
    provide_all(both(site), root)
    found = files_below(root)
    assert found.pop(".detseg.lock") == b""
    assert found == {"images/a.jpg": b"a", "images/deep/b.jpg": b"b", "README": b"one", "masks/a.png": b"m"}
    provide_all(both(site), root)
    assert len(site.asked) == 2  # nothing is fetched again
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]


def test_a_folder_below_the_root(tmp_path: Path, site: Site):
    source = Archive(gives="annotations/masks", url=f"{site.url}/masks.tgz", take="set-1", into="annotations")
    provide_all([source], tmp_path)
    assert set(files_below(tmp_path)) == {".detseg.lock", "annotations/masks/a.png", "annotations/README"}
    whole = Archive(gives="raw/set-1/masks", url=f"{site.url}/masks.tgz", into="raw")
    provide_all([source, whole], tmp_path)
    assert (tmp_path / "raw/set-1/masks/a.png").read_bytes() == b"m"


def test_what_lies_there_stays_and_what_tells_comes_last(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    for path, text in {"a/new": "1", "a/old": "1", "told/x": "1", "z": "1"}.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    (target / "a").mkdir(parents=True)
    (target / "a" / "old").write_text("0")
    (target / "z").mkdir()  # a folder where the archive has a file
    merge(source, target, last="told")
    assert files_below(target) == {"a/new": b"1", "a/old": b"0", "told/x": b"1"} and (target / "z").is_dir()


def test_what_tells_is_not_there_before_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, target, real, moved = tmp_path / "source", tmp_path / "target", os.replace, []

    def stops_after_two(old: Path, new: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(new.name)
        real(old, new)

    for name in ("a_told", "b", "c"):
        (source / name).mkdir(parents=True)
    monkeypatch.setattr(os, "replace", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        merge(source, target, last="a_told")
    assert moved == ["b", "c"]


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path: Path, site: Site):
    page = f"{site.url}/register"
    source = Archive(gives="images", file="photos.zip", page=page, take="set-1")
    with pytest.raises(DataError) as caught:
        provide_all([source], tmp_path)
    place = tmp_path / "photos.zip"
    assert str(caught.value) == (
        f"photos.zip is not fetched, as its publisher wants a login: get it from {page}, put it at {place} and start "
        "again"
    )
    place.write_bytes(site.files["/photos.zip"])
    provide_all([source], tmp_path)
    assert (tmp_path / "images/a.jpg").read_bytes() == b"a" and place.is_file() and site.asked == []


def test_checksums_hold_for_both_ways(tmp_path: Path, site: Site):
    good = "sha1:" + hashlib.sha1(site.files["/photos.zip"]).hexdigest()
    url = f"{site.url}/photos.zip"
    with pytest.raises(DownloadError, match=r"published is 0{40}"):
        provide_all([Archive(gives="images", url=url, take="set-1", checksum="sha1:" + "0" * 40)], tmp_path)
    assert not (tmp_path / "images").exists()
    (tmp_path / "photos.zip").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=r"photos\.zip has sha1 .* remove it and fetch it again"):
        provide_all([Archive(gives="images", url=url, take="set-1", checksum=good)], tmp_path)
    (tmp_path / "photos.zip").unlink()
    provide_all([Archive(gives="images", url=url, take="set-1", checksum=good)], tmp_path)
    assert (tmp_path / "images").is_dir()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped({"set-1/images/a.jpg": b"a", "../../canary": b"x"}), "leads out"),
        (tarred({"/tmp/canary": b"x"}), "absolute"),
        (tarred({"set-1/images": b""}, tarfile.SYMTYPE, "../.."), "symbolic link"),
        (tarred({"set-1/images": b""}, tarfile.LNKTYPE, "photos.zip"), "hard link"),
        (tarred({"set-1/images": b""}, tarfile.CHRTYPE), "device"),
        (b"PK not really", "no zip or tar file"),
        (zipped({"set-2/images/a.jpg": b"a"}), "has no set-1/images; is it another release"),
    ],
    ids=["..", "absolute", "symlink", "hard link", "device", "damaged", "another release"],
)
def test_what_is_refused_leaves_nothing(tmp_path: Path, site: Site, content: bytes, reason: str):
    site.files["/photos.zip"] = content
    root = tmp_path / "deep" / "set"
    with pytest.raises(ValueError, match=reason) as caught:
        provide_all(both(site), root)
    assert "\n" not in str(caught.value)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "deep/set/.detseg.lock"
    ]
    site.files["/photos.zip"] = zipped(PHOTOS)  # mended, it comes again
    provide_all(both(site), root)
    assert (root / "images" / "a.jpg").is_file()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, site: Site):
    (tmp_path / ".unpack.abc").mkdir()
    (tmp_path / ".unpack.abc" / "half").write_bytes(b"x")
    provide_all(both(site), tmp_path)
    assert not list(tmp_path.glob(".unpack.*"))


def test_others_wait(tmp_path: Path, site: Site):
    site.silence = 0.2
    threads = [threading.Thread(target=provide_all, args=(both(site), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.asked) == 2 and (tmp_path / "masks/a.png").is_file()


def test_settings_that_cannot_be(site: Site):
    url = f"{site.url}/x.zip"
    with pytest.raises(ValueError, match="give url, or file and page"):
        Archive(gives="images", file="x.zip")
    for path in ("../images", "/images"):
        with pytest.raises(ValueError, match="leads out of the root"):
            Archive(gives=path, url=url)
    with pytest.raises(ValueError, match="leads out of the root"):
        Archive(gives="images", url=url, into="..")
    with pytest.raises(ValueError, match="below that"):
        Archive(gives="images", url=url, into="masks")
    with pytest.raises(ValueError, match="ends in no name"):
        Archive(gives="images", url=f"{site.url}/")
    with pytest.raises(ValueError, match="must be md5"):
        Archive(gives="images", url=url, checksum="123")
