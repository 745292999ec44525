"""The loader that every split is read through."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import cv2
from torch.utils.data import DataLoader

from detseg.data.sample import Sample
from detseg.data.samplers import TrainSampler
from detseg.data.watch import named_deaths

LINGER = 30
"""Seconds that a worker lives on after SIGTERM."""


class LateLoader(DataLoader[Sample]):
    """Reads nothing before its first batch is asked for, and can begin in the middle of an epoch.

    In a resumed run Lightning makes the iterator before it tells the sampler its epoch; workers would by then have
    begun with the images of epoch 0. How many batches are trained, whatever was fetched ahead of them, it is told by
    ``detseg.tasks.position`` through the two methods by which Lightning knows a loader that can be resumed.
    """

    _skip = 0, 0  # batches to leave out at the start of an epoch, and which one

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator around torch's iterator
        (skip, epoch), self._skip = self._skip, (0, 0)
        if getattr(self.sampler, "epoch", epoch) != epoch:  # all were trained, so nobody asked for the rest
            skip = 0
        if isinstance(self.sampler, TrainSampler):
            self.sampler.skip = skip * int(self.batch_size or 1)
            skip = 0
        with one_opencv_thread() if self.num_workers else nullcontext():
            batches = super().__iter__()
        with named_deaths(self.dataset, batches):
            yield from itertools.islice(batches, skip, None)

    def state_dict(self) -> dict[str, int]:
        """Return nothing of use: that a batch was handed out does not mean that it was trained."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the first ``state["batch"]`` batches of epoch ``state["epoch"]``, should it be the next."""
        self._skip = int(state.get("batch", 0)), int(state.get("epoch", 0))


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Let workers that start meanwhile have one thread of OpenCV's; afterwards this process has as many as before.

    A worker that is forked inherits OpenCV's pool without its threads: to change their number, or to wait for their
    work, would never end. With one thread there is no pool.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def calm_worker(worker: int) -> None:
    """Let a data worker outlive the signals that end a run, which reach it too where they go to a process group.

    The run still needs it for the step under way. One that torch has to end, by SIGTERM, ends ``LINGER`` seconds later.
    One that was not forked has OpenCV's threads, as many as cores, and gets by with one: processes share the cores.
    """
    cv2.setNumThreads(1)  # does nothing where one_opencv_thread has seen to it
    signal.set_wakeup_fd(-1)  # inherited from the run, which would take the worker's signals for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER))
