"""Fetching files over HTTP: checked, and whole or not there; what was cut short goes on where it ended.

The bytes lie in ``.<name>.download`` beside the file until all have come and the checksum is right, then the name is
changed. Beside them is kept what the server said the file was (RFC 9110: ETag, Last-Modified), so that a later start
asks for the rest of the same file alone (Range, If-Range), and begins anew where it has changed since. Proxies are
taken from the environment, as urllib does. Nothing is sent but the request: there are no logins.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from detseg.data.check import DataError

log = logging.getLogger(__name__)

CHUNK = 2**20
REPORT_EVERY = 20.0
"""Seconds between two lines about a long download."""

LOST = (OSError, http.client.HTTPException)
"""What a connection that is refused, cut or silent raises; urllib's URLError is an OSError."""


class DownloadError(DataError):
    """A file could not be fetched; one line with the address, the reason and what to do."""


class _Again(Exception):
    """This attempt failed, another may not."""


def fetch(
    url: str,
    file: str | Path,
    *,
    checksum: str | None = None,
    page: str | None = None,
    attempts: int = 5,
    timeout: float = 60.0,
    pause: float = 1.0,
) -> Path:
    """Fetch ``url`` into ``file``, unless it is there.

    Args:
        url: http or https address.
        file: where the file appears once it is whole. One that exists is compared with ``checksum`` and left alone.
        checksum: ``md5:``, ``sha1:`` or ``sha256:`` and the hexadecimal digits; ``None``: none is published.
        page: where a person finds the file, for messages; ``None``: the address itself.
        attempts: failures in a row without a mebibyte between them, after which it is given up.
        timeout: seconds without a byte after which a connection counts as lost.
        pause: seconds before the second attempt; twice that before each further one.

    Returns:
        ``file``.

    Raises:
        DownloadError: the network fails, the server refuses, wants a login or sends a web page in place of a file, the
            disk has no room, or the checksum differs.
        ValueError: another kind of address or checksum.
    """
    file = Path(file)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: only http and https are fetched")
    if checksum is not None:
        split_checksum(checksum)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.parent / f".{file.name}.download") as part:
            if file.exists():  # another process fetched it meanwhile
                Path(part.name).unlink(missing_ok=True)
            else:
                job = _Job(url, file, part, page or url, checksum)
                job.run(attempts, timeout, pause)
                job.verify()
                job.finish()
                return file
    compare(file, checksum)
    return file


def compare(file: Path, checksum: str | None) -> None:
    """Raise ``DownloadError`` unless a file that is there has the published checksum, if there is one."""
    if checksum is not None:
        kind, digits = split_checksum(checksum)
        found = digest_of(file, kind)
        if found != digits:
            raise DownloadError(f"{file} has {kind} {found}, published is {digits}; remove it and fetch it again")


def split_checksum(text: str) -> tuple[str, str]:
    """Return kind and digits of a checksum such as ``md5:d41d8cd98f00b204e9800998ecf8427e``.

    Raises:
        ValueError: another form.
    """
    kind, _, digits = text.partition(":")
    lengths = {"md5": 32, "sha1": 40, "sha256": 64}
    if not re.fullmatch(r"[0-9a-f]+", digits) or lengths.get(kind) != len(digits):
        raise ValueError(f"checksum {text!r} must be md5:, sha1: or sha256: and 32, 40 or 64 hexadecimal digits")
    return kind, digits


def digest_of(file: Path, kind: str) -> str:
    """Return the hexadecimal digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for appending once no other process has it open like this."""
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield file
                return  # else it was renamed or removed while we waited, and another is to be opened


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows http and https, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Return the next request (called by urllib)."""
        if not newurl.startswith("https://") and not (newurl.startswith("http://") and req.type == "http"):
            raise DownloadError(f"{req.full_url}: the server leads on to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Job:
    """One file on its way.

    Args:
        url, file: see :func:`fetch`.
        part: what has come so far, opened and locked.
        page: for messages.
        checksum: which tells in the end whether the parts fit; ``None``: nothing does.
    """

    def __init__(self, url: str, file: Path, part: IO[bytes], page: str, checksum: str | None) -> None:
        self.url, self.file, self.part, self.page, self.checksum = url, file, part, page, checksum
        self.state = file.parent / f".{file.name}.download.json"
        self.total: int | None = None

    def run(self, attempts: int, timeout: float, pause: float) -> None:
        """Fetch all bytes."""
        failures = 0
        while True:
            before = self.size()
            try:
                return self.attempt(timeout)
            except (_Again, *LOST) as error:
                why = _line(error)
                failures = 1 if self.size() - before >= CHUNK else failures + 1
            if failures >= attempts:
                of = "" if self.total is None else f" of {self.total}"
                raise DownloadError(
                    f"{self.url}: {why}; given up after {attempts} attempts with {self.size()}{of} bytes here. Start "
                    f"again to go on from there, or get it from {self.page} and put it at {self.file}"
                )
            log.info("%s: %s; trying again", self.url, why)
            time.sleep(pause * 2 ** (failures - 1))

    def attempt(self, timeout: float) -> None:
        """Ask for what is missing, and write what comes."""
        start = self.size()
        kept = self.said()
        if start and not kept and self.checksum is None:  # nothing tells whether the rest belongs to it
            start = self.cut(0)
        request = urllib.request.Request(self.url, headers={"User-Agent": "detseg", "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
            if kept:
                request.add_header("If-Range", kept)
        try:
            with urllib.request.build_opener(_Redirects()).open(request, timeout=timeout) as answer:
                self.receive(answer, start)
        except urllib.error.HTTPError as error:
            with error:
                self.refused(error, start)

    def receive(self, answer: http.client.HTTPResponse, start: int) -> None:
        """Write an answer to the end of the part, or over it where the server sends the whole file."""
        headers = answer.headers
        if headers.get_content_type() == "text/html" and self.file.suffix not in (".html", ".htm"):
            raise DownloadError(
                f"{self.url}: the server sent a web page in place of a file; it may want a login or have moved it. Get "
                f"it from {self.page} and put it at {self.file}"
            )
        length = headers.get("Content-Length")
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if found is None or int(found[1]) != start:
                self.cut(0)
                raise _Again(f"asked for bytes from {start}, the server sent {headers.get('Content-Range')!r}")
            self.total = None if found[2] == "*" else int(found[2])
        else:
            start = self.cut(0)
            self.total = int(length) if length is not None and length.isdecimal() else None
        self.keep(headers.get("ETag"), headers.get("Last-Modified"))
        self.make_room(start)
        self.copy(answer)
        if self.total is not None and self.size() != self.total:
            if self.size() > self.total:
                self.cut(0)
            raise _Again("the connection was cut")

    def copy(self, answer: http.client.HTTPResponse) -> None:
        """Write what comes until no more does."""
        told = time.monotonic()
        while chunk := answer.read(CHUNK):
            try:
                self.part.write(chunk)
                self.part.flush()
            except OSError as error:  # the disk's, which no second attempt mends
                raise DownloadError(f"{self.file} cannot be written: {_line(error)}; what came is kept") from error
            if time.monotonic() - told > REPORT_EVERY:
                told = time.monotonic()
                of = "" if self.total is None else f" of {self.total / 1e6:.0f}"
                log.info("%s: %.0f%s MB", self.file.name, self.size() / 1e6, of)

    def refused(self, error: urllib.error.HTTPError, start: int) -> None:
        """Say what a refusal means; return where it means that all has come."""
        if error.code == 416 and start:  # nothing there beyond what we have
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if total is not None and int(total[1]) == start:
                return
            self.cut(0)
            raise _Again("what was kept does not fit the server's file, beginning anew")
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Again(f"the server answered {error.code} {error.reason}")
        reason = "leads nowhere" if error.code < 400 else "does not have it"
        reason = "wants a login" if error.code in (401, 403, 407) else reason
        raise DownloadError(
            f"{self.url}: the server {reason} ({error.code} {_line(error)}). Get it from {self.page} and put it at "
            f"{self.file}"
        )

    def verify(self) -> None:
        """Compare the checksum, if one is known, and remove what has another."""
        if self.checksum is None:
            return
        kind, digits = split_checksum(self.checksum)
        self.part.flush()
        found = digest_of(Path(self.part.name), kind)
        if found != digits:
            size = self.size()
            self.discard()
            raise DownloadError(
                f"{self.url}: the {size} bytes that came have {kind} {found}, published is {digits}; they are removed. "
                "Start again; if it stays so, the publisher has changed the file"
            )

    def finish(self) -> None:
        """Give the file its name."""
        self.part.flush()
        os.fsync(self.part.fileno())
        os.replace(self.part.name, self.file)
        self.state.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has come."""
        Path(self.part.name).unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)

    def size(self) -> int:
        """Return how many bytes have come."""
        self.part.flush()
        return os.fstat(self.part.fileno()).st_size

    def cut(self, size: int) -> int:
        """Keep the first ``size`` bytes and return it."""
        self.part.truncate(size)
        return size

    def keep(self, etag: str | None, modified: str | None) -> None:
        """Remember which state of the file this is; a weak ETag does not promise the same bytes."""
        validator = etag if etag is not None and not etag.startswith("W/") else modified
        self.state.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")

    def said(self) -> str | None:
        """Return which state of the file the kept bytes are of; ``None``: unknown, or of another address."""
        with suppress(OSError, ValueError):
            content = json.loads(self.state.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("url") == self.url and content.get("validator"):
                return str(content["validator"])
        return None

    def make_room(self, start: int) -> None:
        """Raise where the disk is too small for what is to come."""
        free = shutil.disk_usage(self.file.parent).free
        if self.total is not None and self.total - start > free:
            raise DownloadError(
                f"{self.url}: {self.total - start} bytes are to come, {self.file.parent} has room for {free}; make "
                "room, or set data.root to a larger disk"
            )


def _line(error: BaseException) -> str:
    """Return an error in one line."""
    reason = getattr(error, "reason", None) or error
    text = " ".join(str(reason).split())
    return text or type(error).__name__
