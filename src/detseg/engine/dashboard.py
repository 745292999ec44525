"""The local dashboards on a tree of runs: TensorBoard for its event files, MLflow for its store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("tensorboard", "mlflow")
HOST = "127.0.0.1"
"""Who sits elsewhere forwards the port by ssh: neither dashboard asks for a password."""
START = 90.0  # seconds in which a dashboard must answer; MLflow imports a lot

USAGE = """usage: detseg dashboard [directory] [tool=tensorboard|mlflow] [port=6006]

Opens the curves and pictures of all runs below a directory, `runs` if none is given, until Ctrl-C.
TensorBoard shows runs with logger=tensorboard, MLflow those with logger=mlflow; without tool=, whichever there is."""


def find_tool(directory: Path) -> str:
    """Return the dashboard that has something to show below ``directory``, TensorBoard first.

    Raises:
        FileNotFoundError: there is no such directory, or nothing in it for either.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory (looked from {Path.cwd()})")
    if next(directory.rglob("events.out.tfevents.*"), None) is not None:
        return "tensorboard"
    if (directory / "mlflow.db").exists():
        return "mlflow"
    raise FileNotFoundError(
        f"no run below {directory} has anything for a dashboard; train with logger=[csv,tensorboard] or "
        "logger=[csv,mlflow]"
    )


def command(tool: str, directory: Path, port: int) -> list[str]:
    """Return the command line of a dashboard.

    Raises:
        ValueError: there is no such tool.
        FileNotFoundError: MLflow is asked for, and ``directory`` has no store.
    """
    if tool == "tensorboard":
        module = ["tensorboard.main", "--logdir", str(directory), "--reload_interval", "10"]
    elif tool == "mlflow":
        store = directory.resolve() / "mlflow.db"
        if not store.exists():
            raise FileNotFoundError(f"{store}: no run here was logged by MLflow; train with logger=[csv,mlflow]")
        module = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    else:
        raise ValueError(f"tool={tool}: there is no such dashboard; there are {' and '.join(TOOLS)}")
    return [sys.executable, "-m", *module, "--host", HOST, "--port", str(port)]


def free_port(wanted: int = 0) -> int:
    """Return ``wanted`` if nobody listens there, else a port that is free now."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise OSError(f"no port of {HOST} is free")


@contextmanager
def serving(
    tool: str, directory: Path, port: int, *, quiet: bool = True
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a dashboard within this block; all its processes end with it.

    Args:
        tool: ``"tensorboard"`` or ``"mlflow"``.
        directory: below which the runs lie.
        port: where it listens.
        quiet: leave out what it prints.

    Yields:
        Its address, where it answers already, and its process.

    Raises:
        RuntimeError: it ended or did not answer in time.
    """
    output = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    process = subprocess.Popen(
        command(tool, directory, port), stdout=output, stderr=output, start_new_session=True, env=environment
    )
    try:
        address = f"http://{HOST}:{port}/"
        _wait(address, process, tool)
        yield address, process
    finally:
        _end(process)


def _wait(address: str, process: subprocess.Popen[bytes], tool: str) -> None:
    latest = time.monotonic() + START
    while time.monotonic() < latest:
        if process.poll() is not None:
            raise RuntimeError(f"{tool} ended with exit code {process.returncode} before it answered at {address}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"{tool} did not answer at {address} within {START:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the dashboard and the processes that it started."""
    for number, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def options(arguments: Sequence[str]) -> tuple[Path, str | None, int]:
    """Return directory, tool and port from what was typed after ``detseg dashboard``.

    Raises:
        ValueError: something else was typed.
    """
    directory, given = Path("runs"), {"tool": "", "port": "6006"}
    places = [text for text in arguments if "=" not in text or Path(text).is_dir()]
    if len(places) > 1 or any(text.startswith("-") for text in places):
        raise ValueError(f"detseg dashboard does not understand {' '.join(places)}\n{USAGE}")
    for text in arguments:
        key, equals, value = text.partition("=")
        if text in places:
            directory = Path(text)
        elif key not in given or not value:
            raise ValueError(f"detseg dashboard has no {key}{equals}{value}; it takes a directory, tool= and port=")
        else:
            given[key] = value
    if not given["port"].isdecimal():
        raise ValueError(f"port={given['port']} is no number")
    return directory, given["tool"] or None, int(given["port"])


def dashboard(arguments: Sequence[str]) -> None:
    """Serve a dashboard until it is interrupted; see ``USAGE``."""
    if any(text in ("-h", "--help") for text in arguments):
        print(USAGE)
        return
    directory, tool, port = options(arguments)
    tool = tool or find_tool(directory)
    chosen = free_port(port)
    if port and chosen != port:
        print(f"port {port} is taken", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal leaves no server behind either
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    with serving(tool, directory, chosen) as (address, process):
        print(f"{tool} on {directory}: {address} (Ctrl-C ends it)", flush=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            print()
