"""Signals that tell a run to end: noted while it trains, obeyed at once before and after."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ClassVar, NoReturn

log = logging.getLogger(__name__)

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAVING = 300.0
"""Seconds that a process may take for a checkpoint and a split's figures, where it would end after ``grace``."""
AT_ONCE = 5.0
"""Seconds that a process has after a second Ctrl-C."""


def code_of(number: int) -> int:
    """Return the exit code: 130 after Ctrl-C, else 143, as after SIGTERM."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class Signals:
    """What this process was told; a thread watches that it obeys."""

    active: ClassVar[Signals | None] = None
    """The one that listens, if one does."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that came while training."""
        self.pid = os.getpid()
        self._deferred = self._leaving = self._saving = False
        self._requeue = True
        self._grace: float | None = None
        self._interrupts = 0  # Ctrl-C
        self._last = time.monotonic()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read, True)
        self._before: dict[int, object] = {}
        self._wakeup = -1
        self._thread = threading.Thread(target=self._watch, name="detseg-signals", daemon=True)

    @staticmethod
    def name(number: int) -> str:
        """Return what a user calls a signal."""
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def start(self) -> None:
        """Begin to listen."""
        self._before = {number: signal.getsignal(number) for number in HANDLED}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.install()
        self._thread.start()

    def stop(self) -> None:
        """Leave all as it was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal returned
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # which ends the thread
        self._thread.join(1)
        os.close(self._read)

    def install(self) -> None:
        """Put the handlers in place, once more where somebody has put others there."""
        for number in HANDLED:
            signal.signal(number, self._handle)

    def defer(self, *, grace: float | None, requeue: bool) -> None:
        """Note signals from now on; see ``Shutdown`` for the arguments. ``grace=None``: wait as long as it takes."""
        self._deferred, self._grace, self._requeue = True, grace, requeue
        self.beat()

    def undefer(self) -> None:
        """Obey at once again."""
        self._deferred = False

    def beat(self) -> None:
        """Say that this process is not stuck."""
        self._last = time.monotonic()

    def save(self) -> None:
        """Say that a checkpoint is being written, or a split's figures are counted, which takes its time."""
        self._saving = True
        self.beat()

    def saved(self) -> None:
        """Say that this is done."""
        self._saving = False
        self.beat()

    def leave(self, number: int) -> NoReturn:
        """End the process, by an exception that runs all ``finally`` clauses.

        Raises:
            SystemExit: with the exit code.
        """
        self._leaving, self._saving = True, False
        self.beat()
        if number == signal.SIGUSR1 and self._requeue and requeue():
            raise SystemExit(0)
        raise SystemExit(code_of(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # in a process that was forked off
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, self._interrupts = self.number is None, self._interrupts + int(number == signal.SIGINT)
        if self._interrupts > 1:
            raise SystemExit(code_of(signal.SIGINT))
        if self._leaving:
            return
        self.number = self.number or number
        if not self._deferred:
            self.leave(number)
        if first and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # of several processes one says so
            _say("the run ends after this step, with a checkpoint; Ctrl-C again ends it at once")

    def _watch(self) -> None:
        """Wait for signals in a thread: a handler does not run while the main thread is stuck in an exchange."""
        came: list[int] = []
        while found := os.read(self._read, 16):
            came.extend(number for number in found if number in HANDLED)
            if came.count(signal.SIGINT) == 2:
                threading.Thread(target=_end, args=(AT_ONCE, code_of(signal.SIGINT)), daemon=True).start()
            elif len(came) == 1:
                self.beat()
                threading.Thread(target=self._end_if_stuck, args=(came[0],), daemon=True).start()

    def _end_if_stuck(self, number: int) -> None:
        while self._grace is not None:
            limit = SAVING if self._saving else self._grace
            left = self._last + limit - time.monotonic()
            if left < 0 and Signals.active is self:
                _say(f"ended by {self.name(number)} without a checkpoint: nothing moved for {limit:g} s")
                os._exit(code_of(number))
            if Signals.active is not self:
                return
            time.sleep(min(max(0.1, left), 1.0))  # the limit may become another


@contextmanager
def listening() -> Iterator[Signals | None]:
    """Listen for signals; inside another one, or in a thread, which gets none, nothing changes."""
    if Signals.active is not None or threading.current_thread() is not threading.main_thread():
        yield Signals.active if threading.current_thread() is threading.main_thread() else None
        return
    signals = Signals.active = Signals()
    signals.start()
    try:
        yield signals
    finally:
        Signals.active = None
        signals.stop()


def requeue() -> bool:
    """Have Slurm queue this job again, from its first process; say whether this is a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        log.warning("SLURM_JOB_ID is %r, which is no job: not queued again", job)
        return False
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) != 0:
        return True
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("scontrol requeue %s failed: %s", job, error)
        return False
    log.warning("job %s is queued again", job)
    return True


def _end(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)


def _say(text: str) -> None:
    """Write a line to standard error, from a handler or a thread: logging may be held by what was interrupted."""
    with suppress(OSError):
        os.write(2, f"detseg: {text}\n".encode())


def _forget() -> None:
    """In a process that was forked off: its signals are not its parent's."""
    if Signals.active is not None:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
