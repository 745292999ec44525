"""Starting ``detseg`` as a user does, and being sure that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

DETSEG = str(Path(sys.executable).with_name("detseg"))
SMALL = ["data.image_size=64", "data.train_images=8", "data.val_images=5", "data.batch_size=2", "data.num_workers=0"]
SHORT = ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "callbacks.images=null", "callbacks.curves=null"]
TINY = ["model=fcos_small", *SMALL, *SHORT]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


@contextmanager
def started(
    arguments: list[str], cwd: Path, *, name: str = "out", env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose output goes to ``<name>.txt`` and ``<name>.err``; whatever is left of it is killed."""
    with (cwd / f"{name}.txt").open("w") as out, (cwd / f"{name}.err").open("w") as err:
        process = subprocess.Popen(
            arguments,
            cwd=cwd,
            env=dict(env or environment()),
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
    seen: dict[int, psutil.Process] = {}
    try:
        family(process.pid, seen)
        yield process
    finally:
        family(process.pid, seen)
        for one in [*seen.values()]:
            with suppress(psutil.Error):
                one.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def family(pid: int, seen: dict[int, psutil.Process] | None = None) -> dict[int, psutil.Process]:
    """Return all descendants of a process, added to those ``seen`` before."""
    seen = {} if seen is None else seen
    with suppress(psutil.Error):
        seen |= {child.pid: child for child in psutil.Process(pid).children(recursive=True)}
    return seen


def workers(pid: int) -> dict[int, psutil.Process]:
    """Return the workers below a launcher by rank.

    A worker's child has the same command line and environment until it runs a program of its own: it is left out.
    """
    found = {}
    everybody = family(pid)
    for child in everybody.values():
        with suppress(psutil.Error):
            agent = everybody.get(child.ppid())
            if agent is None or "detseg.engine.processes.agent" not in agent.cmdline():
                continue
            if "detseg.engine.processes.worker" in child.cmdline() and "RANK" in (own := child.environ()):
                found[int(own["RANK"])] = child
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return what ``condition`` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{condition} was not true within {seconds} s")


def alive(processes: dict[int, psutil.Process]) -> list[int]:
    """Return the ids of those that still run; zombies do not."""
    left = []
    for process in processes.values():
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
    return left
