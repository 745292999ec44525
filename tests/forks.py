"""The command line in a process of its own, forked from this one, so that nothing is imported again.

Importing torch, Lightning and the rest takes 5 seconds of a processor, most of what a short run costs. A fork has an
id, a working directory, an environment, output and an exit code of its own, can be sent signals and killed, and leaves
this process as it was. What an interpreter does as it starts, and processes that start others, are for real ones; see
``processes``.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from detseg.data.loader import one_opencv_thread

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_forked(
    arguments: list[str], cwd: Path, *, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``detseg`` with these arguments to its end; ``env`` is added to this process's environment."""
    if torch.cuda.is_available():  # a process that may have used a GPU cannot be forked
        return run_anew(arguments, cwd, env=env, timeout=timeout)
    paths = [cwd / f".forked.{name}" for name in ("out", "err")]
    pid = fork(lambda: command(arguments), cwd=cwd, paths=paths, env=env or {})
    code = wait(pid, timeout)
    out, err = (path.read_text() for path in paths)
    for path in paths:
        path.unlink()
    return subprocess.CompletedProcess(["detseg", *arguments], code, out, err)


def run_anew(
    arguments: list[str], cwd: Path, *, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``detseg`` as ``run_forked`` does, by an interpreter of its own."""
    line, own = [sys.executable, "-m", "detseg.cli.main", *arguments], {**os.environ, **(env or {})}
    return subprocess.run(line, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)


def command(arguments: list[str]) -> int:
    """Be the command line; return its exit code."""
    from detseg.cli.main import main

    sys.argv = ["detseg", *arguments]
    return main(arguments)


def wait(pid: int, timeout: float) -> int:
    """Return the exit code of a child, negative after a signal; it is killed after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end within {timeout} s")


def fork(work: Callable[[], int], *, cwd: Path, paths: list[Path], env: Mapping[str, str]) -> int:
    """Start ``work``, whose result is the exit code, in a child that leads a session; return its id.

    Args:
        work: what the child does.
        cwd: where.
        paths: files that get its output and its errors.
        env: added to its environment; ``PYTHONPATH`` is searched first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with one_opencv_thread():  # of its threads a child has none
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        begin(cwd, paths, env)
        code = work()
        atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(cwd: Path, paths: list[Path], env: Mapping[str, str]) -> None:
    """Take off what belongs to the tests' process: its output, log handlers, signals and ends."""
    os.setsid()
    for number in STOP:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.update(env)
    sys.path[:0] = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    for stream, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    warnings._showwarnmsg_impl = _show  # type: ignore[attr-defined]  # pytest collects them
    plain_logging()
    atexit._clear()
    torch.set_num_threads(1)


def _show(message: warnings.WarningMessage) -> None:
    sys.stderr.write(warnings.formatwarning(message.message, message.category, message.filename, message.lineno))  # type: ignore[arg-type]


def plain_logging() -> None:
    """Leave logging as it is before anybody sets it up: warnings go to the errors, the rest nowhere."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
