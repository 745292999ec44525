"""Processes for trials: each has a GPU or a group of cores to itself, and none outlives the study.

A trial that fails, runs out of memory or is killed takes nothing else down. The kernel kills a trial whose study is
gone (PR_SET_PDEATHSIG), and a trial holds its directory's log locked, so that the next session waits for it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detseg.config import ConfigError
from detseg.engine.sweeps.nursery import die_with_parent, lead_session
from detseg.engine.sweeps.record import RECORD, TrialRecord, write_record
from detseg.secrecy import redact

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from omegaconf import DictConfig

    from detseg.experiment import Outcome

LOG = "train.log"
"""In a trial's directory: all that it printed."""

LOCK_SECONDS = 60.0
"""How long a trial waits until a former process of its directory, which is being killed, is gone."""

Objective = Callable[["DictConfig"], "Outcome"]
"""What a trial does; ``detseg.experiment.train``, or another function of a module."""


@dataclass(frozen=True)
class Slot:
    """What one trial has to itself.

    Attributes:
        gpus: as in CUDA_VISIBLE_DEVICES: numbers or names; empty for the CPU.
        cores: numbers of the processor cores; empty where the system cannot tell.
    """

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Order:
    """One run, in the way in which it travels to its process.

    Attributes:
        config: plain container of the config, with its interpolations.
        directory: the run's.
        record: what is known of it beforehand; the process adds how it ended.
        objective: what it does.
    """

    config: dict[str, Any]
    directory: Path
    record: TrialRecord
    objective: Objective


@dataclass
class _Place:
    slot: Slot
    process: ForkServerProcess | None = None
    order: Order | None = None
    started: float = field(default_factory=time.monotonic)


def slots(workers: int | None, *, gpus: Sequence[str] = (), per_trial: int = 1) -> list[Slot]:
    """Share the machine out.

    Args:
        workers: trials at a time; ``None``: one per group of GPUs, or one alone without GPUs.
        gpus: those that there are.
        per_trial: GPUs of one trial.

    Raises:
        ConfigError: there are fewer GPUs than one trial wants, or more trials at a time than groups of GPUs or cores.
    """
    groups = [tuple(gpus[i : i + per_trial]) for i in range(0, len(gpus) - per_trial + 1, per_trial)]
    if gpus and not groups:
        raise ConfigError(f"tune.gpus={per_trial}: there are {len(gpus)} GPUs")
    count = workers if workers is not None else max(1, len(groups))
    if count < 1 or (groups and count > len(groups)):
        raise ConfigError(
            f"tune.workers={count}: there is room for 1 to {len(groups)} ({len(gpus)} GPUs, tune.gpus={per_trial})"
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(count))
    if count > len(cores):
        raise ConfigError(f"tune.workers={count}: there are {len(cores)} processor cores, and each run needs one")
    bounds = [len(cores) * i // count for i in range(count + 1)]
    shares = [tuple(cores[low:high]) for low, high in pairwise(bounds)]
    return [Slot(gpus=groups[i] if groups else (), cores=shares[i]) for i in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, without starting CUDA in it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class Pool:
    """Runs orders in processes of their own, one per slot.

    Args:
        slots: from ``slots()``.
    """

    def __init__(self, *, slots: Sequence[Slot]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["detseg.engine.sweeps.nursery"])
        self._places = [_Place(slot) for slot in slots]

    @property
    def free(self) -> int:
        """How many orders can start now."""
        return sum(place.process is None for place in self._places)

    @property
    def busy(self) -> int:
        """How many orders are running."""
        return len(self._places) - self.free

    def start(self, order: Order) -> None:
        """Start an order in a free slot."""
        place = next(place for place in self._places if place.process is None)
        order.directory.mkdir(parents=True, exist_ok=True)
        place.process = self._context.Process(target=_work, args=(order, place.slot), daemon=False)
        place.order, place.started = order, time.monotonic()
        place.process.start()

    def ended(self, timeout: float) -> list[tuple[Order, TrialRecord]]:
        """Wait up to ``timeout`` seconds until some process ends; return each order with how it went.

        The record of a process that died still says "running", with the way in which it died as its error.
        """
        running = {place.process.sentinel: place for place in self._places if place.process is not None}
        done = wait(list(running), timeout)
        return [self._collect(running[sentinel]) for sentinel in done if isinstance(sentinel, int)]

    def _collect(self, place: _Place) -> tuple[Order, TrialRecord]:
        assert place.process is not None and place.order is not None
        place.process.join()
        code, order = place.process.exitcode or 0, place.order
        place.process.close()
        place.process = place.order = None
        record = TrialRecord.read(order.directory)
        if record is None:
            seconds = round(time.monotonic() - place.started, 3)
            record = replace(order.record, error=_death(code, order.directory), seconds=seconds)
        return order, record

    def signal(self, number: int) -> None:
        """Send a signal to every trial; what they started themselves is theirs to end."""
        for place in self._places:
            if place.process is not None and place.process.is_alive() and place.process.pid:
                os.kill(place.process.pid, number)

    def close(self) -> None:
        """Kill what still runs, with all its processes."""
        for place in self._places:
            if place.process is not None:
                _kill_group(place.process.pid)
                place.process.join()
                place.process = place.order = None


def _kill_group(pid: int | None) -> None:
    """Kill a trial and its group, which it leads; a trial that has no group yet, alone."""
    try:
        if pid is not None:
            (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended


def _death(code: int, directory: Path) -> str:
    """Say how a process ended that left no record."""
    if code < 0:
        name = signal.Signals(-code).name
        guess = "; the system may have been out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{guess} (see {directory / LOG})"
    return f"ended with exit code {code} and no figures (see {directory / LOG})"


def _work(order: Order, slot: Slot) -> None:
    """Be a trial: the whole life of its process."""
    die_with_parent()
    if os.getppid() == 1:  # it went before the call
        os._exit(1)
    lead_session()  # and a group, with its data workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lock = _redirect(order.directory)
    _take(slot)
    started = time.monotonic()
    try:
        _run(order, started)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.close(lock)


def _run(order: Order, started: float) -> None:
    """Do the order and write how it ended; what a signal ended writes nothing and can be gone on with."""
    import traceback

    from omegaconf import OmegaConf

    from detseg.config import register_resolvers
    from detseg.engine.errors import quiet, said

    register_resolvers()
    quiet()
    cfg = OmegaConf.create(order.config)
    try:
        outcome = order.objective(cfg)
        record = order.record.finished(outcome.figures, seconds=time.monotonic() - started)
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        record = order.record.failed(said(error) or type(error).__name__, seconds=time.monotonic() - started)
    write_record(order.directory / RECORD, record)


def _redirect(directory: Path) -> int:
    """Send all output to the trial's log and lock it; return the file that holds the lock."""
    import fcntl

    file = os.open(directory / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                os._exit(75)  # EX_TEMPFAIL: a process that nobody can end still works there
            time.sleep(0.05)
    for stream in (1, 2):
        os.dup2(file, stream)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    return file


def _take(slot: Slot) -> None:
    """Keep to the slot's GPUs and cores; fewer threads than cores where the user wants it so."""
    if slot.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    if not slot.cores:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, slot.cores)
    wished = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(len(slot.cores), int(wished)) if wished.isdecimal() and int(wished) else len(slot.cores)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)  # the libraries have read the variables already
