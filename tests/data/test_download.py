"""Fetching: whole or not there, on from where it ended, and one line that says what to do where it fails."""

from __future__ import annotations

import hashlib
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detseg.data import download
from detseg.data.download import DownloadError, fetch, split_checksum
from file_server import Site, serving

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        served.files["/x.bin"] = CONTENT
        yield served


def sum_of(kind: str, content: bytes = CONTENT) -> str:
    return f"{kind}:{hashlib.new(kind, content).hexdigest()}"


def refused(*arguments: Any, **options: Any) -> str:
    """Return the error of a download, which is one line."""
    with pytest.raises(DownloadError) as caught:
        fetch(*arguments, pause=0, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_file_comes_whole_and_alone(tmp_path: Path, site: Site, kind: str):
    file = fetch(f"{site.url}/x.bin", tmp_path / "new" / "x.bin", checksum=sum_of(kind))
    assert file.read_bytes() == CONTENT and [path.name for path in file.parent.iterdir()] == ["x.bin"]
    assert fetch(f"{site.url}/x.bin", file, checksum=sum_of(kind)) == file
    assert len(site.asked) == 1 and site.wanted() == [None]


def test_what_is_cut_goes_on_where_it_ended(tmp_path: Path, site: Site):
    site.cuts = [100_000, 0, 200_000, None]
    file = fetch(f"{site.url}/x.bin", tmp_path / "x.bin", pause=0)
    assert file.read_bytes() == CONTENT
    assert site.wanted() == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]
    assert len({headers["If-Range"] for headers in site.asked[1:]}) == 1


def test_a_later_start_goes_on_too(tmp_path: Path, site: Site):
    site.cuts = [100_000, 50_000]
    text = refused(f"{site.url}/x.bin", tmp_path / "x.bin", attempts=2)
    assert "the connection was cut; given up after 2 attempts with 150000 of 512000 bytes here" in text
    assert not (tmp_path / "x.bin").exists()
    assert fetch(f"{site.url}/x.bin", tmp_path / "x.bin").read_bytes() == CONTENT
    assert site.wanted()[-1] == "bytes=150000-"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("how", ["changed", "changed by date", "no ranges", "other address", "too long"])
def test_parts_of_two_files_are_never_joined(tmp_path: Path, site: Site, how: str):
    site.cuts, site.etag = [100_000], how != "changed by date"
    site.modified = "Mon, 01 Jan 2024 00:00:00 GMT"
    refused(f"{site.url}/x.bin", tmp_path / "x.bin", attempts=1)
    wanted = CONTENT[::-1]
    site.files = {"/x.bin": wanted, "/y.bin": wanted}
    site.modified = "Tue, 02 Jan 2024 00:00:00 GMT"
    site.ranges = how != "no ranges"
    if how == "too long":  # the server's file is shorter than what is kept, whatever it calls it
        site.files["/x.bin"] = wanted = CONTENT[:70_000]
        (tmp_path / ".x.bin.download.json").unlink()
        options: dict[str, Any] = {"checksum": sum_of("md5", wanted)}
    else:
        options = {}
    name = "y" if how == "other address" else "x"
    assert fetch(f"{site.url}/{name}.bin", tmp_path / "x.bin", pause=0, **options).read_bytes() == wanted


def test_without_a_mark_of_its_state_only_a_checksum_allows_to_go_on(tmp_path: Path, site: Site):
    site.etag = False
    for number, checksum in enumerate((None, sum_of("md5"))):
        site.cuts = [100_000]
        file = fetch(f"{site.url}/x.bin", tmp_path / f"{number}", checksum=checksum, pause=0)
        assert file.read_bytes() == CONTENT
    assert site.wanted() == [None, None, None, "bytes=100000-"]
    assert site.asked[-1]["If-Range"] is None


def test_all_had_come_but_for_the_name(tmp_path: Path, site: Site):
    (tmp_path / ".x.bin.download").write_bytes(CONTENT)
    assert fetch(f"{site.url}/x.bin", tmp_path / "x.bin", checksum=sum_of("md5")).read_bytes() == CONTENT
    assert site.wanted() == [f"bytes={len(CONTENT)}-"]


def test_another_checksum(tmp_path: Path, site: Site):
    other = "md5:" + "0" * 32
    text = refused(f"{site.url}/x.bin", tmp_path / "x.bin", checksum=other)
    assert f"512000 bytes that came have md5 {sum_of('md5')[4:]}, published is {'0' * 32}" in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.bin").write_bytes(b"mine")
    assert "remove it and fetch it again" in refused(f"{site.url}/x.bin", tmp_path / "x.bin", checksum=other)
    assert (tmp_path / "x.bin").read_bytes() == b"mine" and len(site.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_login_is_wanted(tmp_path: Path, site: Site, status: int):
    site.statuses = [status]
    page = f"{site.url}/register"
    text = refused(f"{site.url}/x.bin", tmp_path / "x.bin", page=page)
    assert f"the server wants a login ({status} " in text
    assert f"Get it from {page} and put it at {tmp_path / 'x.bin'}" in text and len(site.asked) == 1


def test_a_login_page_in_place_of_the_file(tmp_path: Path, site: Site):
    site.moved["/x.bin"] = f"{site.url}/login"
    site.files["/login"], site.kind = b"<html>who are you?</html>", "text/html; charset=utf-8"
    text = refused(f"{site.url}/x.bin", tmp_path / "x.bin")
    assert "sent a web page in place of a file; it may want a login" in text
    assert not (tmp_path / "x.bin").exists()


def test_a_file_that_is_not_there(tmp_path: Path, site: Site):
    text = refused(f"{site.url}/gone.bin", tmp_path / "x.bin")
    assert "/gone.bin: the server does not have it (404 Not Found)" in text and len(site.asked) == 1


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, site: Site):
    site.statuses = [503, 429, 500]
    assert fetch(f"{site.url}/x.bin", tmp_path / "x.bin", pause=0).read_bytes() == CONTENT
    site.statuses = [503] * 3
    assert "answered 503 Service Unavailable; given up after 3" in refused(
        f"{site.url}/x.bin", tmp_path / "y.bin", attempts=3
    )


def test_progress_counts_as_a_new_start(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "CHUNK", 10_000)
    site.cuts = [20_000] * 25
    assert fetch(f"{site.url}/x.bin", tmp_path / "x.bin", attempts=2, pause=0).read_bytes() == CONTENT
    assert len(site.asked) == 26


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        url = served.url
    text = refused(f"{url}/x.bin", tmp_path / "x.bin", attempts=2)
    assert "refused; given up after 2 attempts with 0 bytes here" in text


def test_silence_counts_as_lost(tmp_path: Path, site: Site):
    site.silence = 0.6
    assert "timed out; given up after 1" in refused(f"{site.url}/x.bin", tmp_path / "x.bin", attempts=1, timeout=0.2)


def test_no_room(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = refused(f"{site.url}/x.bin", tmp_path / "x.bin")
    assert f"512000 bytes are to come, {tmp_path} has room for 1000" in text


def test_a_disk_that_fails_is_no_failure_of_the_network(tmp_path: Path, site: Site):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    job = download._Job(site.url, tmp_path / "x.bin", Full(), site.url, None)  # type: ignore[arg-type]  # a file that fails
    with pytest.raises(DownloadError, match=r"x\.bin cannot be written: .*No space left on device"):
        job.copy(urllib.request.urlopen(f"{site.url}/x.bin"))


def test_redirects(tmp_path: Path, site: Site):
    site.moved = {"/a": f"{site.url}/x.bin", "/b": f"file://{tmp_path}/secret", "/c": "/c"}
    assert fetch(f"{site.url}/a", tmp_path / "a", pause=0).read_bytes() == CONTENT
    assert "leads nowhere (302 " in refused(f"{site.url}/b", tmp_path / "b")
    assert "infinite loop" in refused(f"{site.url}/c", tmp_path / "c", attempts=1)
    asked = urllib.request.Request(site.url.replace("http:", "https:"))
    with pytest.raises(DownloadError, match="is not followed"):
        download._Redirects().redirect_request(asked, None, 302, "Found", {}, f"{site.url}/x.bin")


def test_two_at_a_time_fetch_once(tmp_path: Path, site: Site):
    site.silence = 0.2
    found: list[bytes] = []

    def work() -> None:
        found.append(fetch(f"{site.url}/x.bin", tmp_path / "x.bin").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 3 and len(site.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "x.bin"])
def test_other_kinds_of_addresses(tmp_path: Path, url: str):
    with pytest.raises(ValueError, match="only http and https"):
        fetch(url, tmp_path / "x")


@pytest.mark.parametrize("text", ["", "md5", "md5:12", "crc32:00000000", "sha1:" + "g" * 40, "md5:" + "0" * 40])
def test_checksums_of_another_form(text: str):
    with pytest.raises(ValueError, match="must be md5:, sha1: or sha256:"):
        split_checksum(text)
