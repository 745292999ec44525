"""Rows of figures on their way to a slow store, so that no step waits for it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

Row = tuple[dict[str, float], int | None, float]
"""Figures by name, step, and the time of day in seconds at which they were taken."""

PAUSE = 1.0  # seconds in which rows gather before they are written together


class Handover:
    """Stores rows in order, in a thread of its own.

    What the store cannot take is a warning: a full night's training does not end because a dashboard is away.

    Args:
        write: stores some rows; whatever it raises becomes a warning.
        pause: seconds in which rows gather.
    """

    def __init__(self, write: Callable[[list[Row]], None], *, pause: float = PAUSE) -> None:
        self._write, self._pause = write, pause
        self._queue: queue.SimpleQueue[Row | threading.Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()

    def put(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Hand over a row; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="detseg-tracker", daemon=True)
            self._thread.start()
        self._queue.put((dict(metrics), step, time.time()))

    def drain(self, timeout: float = 60.0) -> None:
        """Wait until everything handed over so far is stored, at most ``timeout`` seconds."""
        if self._thread is None:
            return
        done = threading.Event()
        self._queue.put(done)
        self._hurry.set()
        if not done.wait(timeout):
            log.warning("a tracker has not stored its figures after %.0f s; the run goes on without waiting", timeout)

    def _run(self) -> None:
        while True:
            found = [self._queue.get()]
            self._hurry.wait(self._pause)
            while not self._queue.empty():
                found.append(self._queue.get())
            self._hurry.clear()
            rows = [item for item in found if not isinstance(item, threading.Event)]
            try:
                if rows:
                    self._write(rows)
            except Exception as error:
                log.warning("a tracker refused %d rows of figures: %s: %s", len(rows), type(error).__name__, error)
            for item in found:
                if isinstance(item, threading.Event):
                    item.set()
