"""Which image each data worker is reading, so that one that dies can be told from the image it died of."""

from __future__ import annotations

import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from detseg.data.check import DataError

PID, EPOCH, INDEX, BUSY = range(4)
"""Columns of a worker's row."""

HINTS = {
    signal.SIGKILL: "most often the machine's memory was full: lower data.num_workers, or data.cache_images=false",
    signal.SIGBUS: "most often shared memory was full (/dev/shm): lower data.num_workers or data.batch_size",
    signal.SIGSEGV: "the library that decodes or transforms the image crashed: look at the file, or leave it out",
    signal.SIGABRT: "the library that decodes or transforms the image gave up: look at the file, or leave it out",
}

PATIENCE = 1.0
"""Seconds that a worker's end is waited for after its connection broke."""

DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How torch says so, from the loader or, as soon as the signal arrives, from wherever the main process is."""

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch:
    """A row per worker in shared memory: its process, and the epoch and index of the image that it reads.

    A few numbers are written per image, in some microseconds; nothing is sent.

    Args:
        workers: number of worker processes.
        split: name of the split, for messages.
        file_of: index -> the image's file, or nothing.
    """

    def __init__(self, *, workers: int, split: str, file_of: Callable[[int], str]) -> None:
        self.split, self.file_of = split, file_of
        table = torch.full((workers, 4), -1, dtype=torch.int64)  # (workers, 4)
        self.table: Tensor = cast(Any, table).share_memory_()  # torch gives it no types
        self.processes: Iterable[Any] = ()
        self._rows: NDArray[np.int64] | None = None
        _watches.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A started, not forked, worker gets the shared table, and neither a copy of it nor processes."""
        return {**self.__dict__, "processes": (), "_rows": None}

    @contextmanager
    def reading(self, epoch: int, index: int) -> Iterator[None]:
        """Say that this worker reads an image, until the end of the block; outside of a worker nothing happens.

        Within such a block it may read another image; afterwards it is at the first again.
        """
        worker = get_worker_info()
        if worker is None:
            yield
            return
        if self._rows is None:
            self._rows = self.table.numpy()
        row = self._rows[worker.id]
        outer = row.copy()
        row[:] = (os.getpid(), epoch, index, 1)
        try:
            yield
        finally:
            if outer[BUSY] == 1:
                row[:] = outer
            else:
                row[BUSY] = 0

    def find_dead(self) -> DataError | None:
        """Return the error about a worker that has ended by itself, or is about to, or ``None`` where all are well."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for process in self.processes:
                if process.exitcode:
                    return DataError(self.describe(process.pid, ""))
            time.sleep(0.02)
        return None

    def describe(self, pid: int, said: str) -> str | None:
        """Return what is known of a dead worker, or ``None`` where it is none of these.

        Args:
            pid: of the worker.
            said: torch's error.
        """
        rows = self.table.tolist()
        worker = next((number for number, row in enumerate(rows) if row[PID] == pid), None)
        process = next((one for one in self.processes if one.pid == pid), None)
        if worker is None and process is None:
            return None
        how, hint = _how(process, said)
        if worker is None:
            return f"a data worker of split {self.split} (process {pid}) {how} before its first image{hint}"
        _, epoch, index, busy = rows[worker]
        file = self.file_of(index)
        place = f"image {index} of split {self.split}, epoch {epoch}" + (f" ({file})" if file else "")
        doing = "while it read" if busy else "after it had read"
        return f"data worker {worker} (process {pid}) {how} {doing} {place}{hint}"


@contextmanager
def named_deaths(dataset: Any, batches: Any) -> Iterator[None]:
    """Turn torch's error about a dead worker into one that names the image.

    Args:
        dataset: may have a ``watch``.
        batches: torch's iterator over it, with its workers.

    Raises:
        DataError: a worker died.
    """
    watch: Watch | None = getattr(dataset, "watch", None)
    if watch is not None:
        watch.processes = getattr(batches, "_workers", ())
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        named = _named(error, watch)
        if named is None:
            raise
        raise named from error


def _named(error: Exception, watch: Watch | None) -> DataError | None:
    """Return the error that names what a dead worker was reading.

    Torch says that one died from a signal handler, which may break in here too, until the process is waited for. Before
    the signal comes, its end may show as a broken connection alone, over which its last batch was to come.
    """
    for _ in range(3):
        try:
            named = died(error)
            if named is None and watch is not None and "in DataLoader worker process" not in str(error):
                named = watch.find_dead()
        except RuntimeError as again:
            error = again
        else:
            return named
    return died(error)


def died(error: BaseException) -> DataError | None:
    """Return the error that names what a dead worker was reading, or ``None`` where ``error`` is about something else.

    Args:
        error: of torch's loader, or of training that torch's signal handler broke into.
    """
    match = DIED.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    for pid in (int(number) for number in match[1].split(",")):
        for watch in list(_watches):
            told = watch.describe(pid, str(error))
            if told is not None:
                return DataError(told)
    return None


def _how(process: Any, said: str) -> tuple[str, str]:
    """Return how a worker ended, and what to do about it where that is known."""
    code = None
    if process is not None:
        process.join(timeout=1.0)  # its end may be announced before it can be asked for
        code = process.exitcode
    if code is None:
        match = re.search(r"killed by signal: ([^.]+)\.", said)
        return (f"was killed ({match[1].strip()})" if match else "ended"), ""
    if code >= 0:
        return f"ended with exit code {code}", ""
    number = signal.Signals(-code)
    hint = f"; {HINTS[number]}" if number in HINTS else ""
    return f"was killed by signal {-code} ({number.name})", hint
