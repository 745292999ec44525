"""One of the processes that train together: ``python -m torch.distributed.run ... -m detseg.engine.processes.worker``.

It reads the config that the launcher resolved and never sees Hydra, so that every rank of a run trains with the same
parameters.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from detseg.engine.errors import MENDABLE, exit_code, quiet, said
from detseg.engine.processes import desk
from detseg.secrecy import redact

if TYPE_CHECKING:
    from detseg.experiment import Outcome

ASKED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a run that was asked to end and did so in order."""

GRACE = 10.0
"""Seconds that a process whose run is lost has for its checkpoint and its ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as ``--config`` says, and leave a note on how it ended; return the exit code for the agent.

    Args:
        arguments: default: those of the command line.
    """
    parser = argparse.ArgumentParser(prog="detseg.engine.processes.worker", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved.yaml of the run")
    config = parser.parse_args(arguments).config
    rank = int(os.environ.get("RANK", "0"))
    desk.put(f"pid_{rank}", os.getpid())
    end_with_launcher()
    set_up_logging(rank)
    note = run(config, rank) | {"rank": rank, "pid": os.getpid(), "time": time.time()}
    desk.put(f"rank_{rank}.json", note)
    if note["code"] in ASKED:
        return 0  # else the agent would end the others while they still write
    if note["code"]:
        threading.Thread(target=_end_soon, args=(int(note["code"]),), daemon=True).start()
        if desk.DESK not in os.environ:
            print(f"detseg: rank {rank}: {note['message']}", file=sys.stderr)
    return int(note["code"])


def run(config: Path, rank: int) -> dict[str, Any]:
    """Train; return exit code, kind of error, message, where it arose, and whether the run was told to end."""
    from detseg.config import register_resolvers
    from detseg.experiment import train_here

    quiet()
    register_resolvers()
    try:
        outcome = train_here(cast(DictConfig, OmegaConf.load(config)))
    except SystemExit as end:
        if isinstance(end.code, int):
            return _note(end.code, ended=True)
        return _note(int(bool(end.code)), message=str(end.code or ""), ended=True)
    except KeyboardInterrupt:
        return _note(128 + signal.SIGINT, message="interrupted", ended=True)
    except Exception as error:
        plain = isinstance(error, MENDABLE) and not os.environ.get("DETSEG_DEBUG")
        trace = "" if plain else redact(traceback.format_exc())  # the launcher prints that of the first failure alone
        if desk.DESK not in os.environ:
            print(trace, file=sys.stderr)
        return _note(exit_code(error), kind=type(error).__name__, message=said(error), trace=trace)
    if rank == 0:
        desk.put("outcome.json", plain_outcome(outcome))
    leave_group()
    return _note(0)


def _note(code: int, *, kind: str = "", message: str = "", ended: bool = False, trace: str = "") -> dict[str, Any]:
    return {"code": code, "kind": kind, "message": message, "ended": ended, "trace": trace}


PATHS = ("directory", "checkpoint", "files")
"""Fields of an ``Outcome`` that hold paths."""


def plain_outcome(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain values, for ``detseg.engine.processes.launch.outcome_of``."""
    return asdict(outcome) | {key: _text(getattr(outcome, key)) for key in PATHS}


def _text(value: Any) -> Any:
    return [str(path) for path in value] if isinstance(value, list) else None if value is None else str(value)


def leave_group() -> None:
    """Leave the process group in order, so that nobody waits for this process or warns about it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def set_up_logging(rank: int) -> None:
    """Let the first worker print what Hydra's logging would, also to its file; the others print warnings alone."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout if rank == 0 else sys.stderr)]
    if rank == 0 and os.environ.get(desk.LOG_FILE):
        handlers.append(logging.FileHandler(os.environ[desk.LOG_FILE]))
    text = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=text, handlers=handlers)


def end_with_launcher() -> None:
    """Watch the launcher and the agent from a thread; without one of them, end as on SIGTERM, then at once."""
    launcher = int(os.environ.get(desk.LAUNCHER, "0"))
    threading.Thread(target=_watch, args=(launcher, os.getppid()), name="detseg-launcher", daemon=True).start()


def _watch(launcher: int, agent: int) -> None:
    try:
        handle = os.pidfd_open(launcher) if launcher and hasattr(os, "pidfd_open") else None
    except OSError:  # gone already
        handle, agent = None, 0
    while os.getppid() == agent:
        if handle is None:
            time.sleep(0.5)
        elif select.select([handle], [], [], 0.5)[0]:
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_soon(code: int) -> None:
    """End a process that failed, but whose threads or communicators wait for others."""
    time.sleep(GRACE)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
