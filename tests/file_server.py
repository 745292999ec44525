"""An HTTP server on this machine that behaves as badly as a test asks for, and ends with it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What the server holds and how it answers.

    Attributes:
        url: address of the server, without a slash at its end.
        files: path -> content.
        ranges: whether Range is understood.
        etag, modified: whether the answers name the state of the file, and how.
        cuts: bytes after which the next answers are cut off; ``None`` sends all.
        statuses: status codes of the next answers, before any file is sent.
        moved: path -> address that it leads to.
        kind: content type.
        silence: seconds before an answer's first byte.
        asked: the headers of every request so far.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: bool = True
    modified: str | None = None
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    kind: str = "application/octet-stream"
    silence: float = 0.0
    asked: list[Message] = field(default_factory=list)

    def wanted(self) -> list[str | None]:
        """Return the Range of every request."""
        return [headers["Range"] for headers in self.asked]


@contextmanager
def serving() -> Iterator[Site]:
    """Serve a site on a free port until the block ends."""
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append(self.headers)
        time.sleep(site.silence)
        if site.statuses:
            self.answer(site.statuses.pop(0))
        elif self.path in site.moved:
            self.answer(302, {"Location": site.moved[self.path]})
        elif self.path not in site.files:
            self.answer(404)
        else:
            self.send(site.files[self.path])

    def send(self, content: bytes) -> None:
        site = self.site
        tag = f'"{hashlib.md5(content).hexdigest()}"' if site.etag else None
        headers = {"Content-Type": site.kind} | ({"ETag": tag} if tag else {})
        headers |= {"Last-Modified": site.modified} if site.modified else {}
        asked, start, status = self.headers["Range"], 0, 200
        if asked and site.ranges and self.headers["If-Range"] in (None, tag, site.modified):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"], status = f"bytes {start}-{len(content) - 1}/{len(content)}", 206
        cut = site.cuts.pop(0) if site.cuts else None
        self.answer(status, headers, content[start:], cut)

    def answer(
        self, status: int, headers: dict[str, Any] | None = None, body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
