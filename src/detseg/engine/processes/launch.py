"""Starting the processes of a run, passing signals on to them, and saying how they ended.

The process that composed the config does this; see DESIGN. It trains nothing itself and starts no device.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from detseg.engine.errors import WorkerFailed
from detseg.engine.processes import desk
from detseg.engine.processes.plan import Plan, plan, write_config
from detseg.engine.processes.worker import ASKED, PATHS
from detseg.experiment import Outcome

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that a launcher passes on to every worker."""

PATIENCE = 60.0
"""Seconds from the first signal to end until the workers are killed: they may be writing a large checkpoint."""


def launch(cfg: DictConfig) -> Outcome:
    """Train in the processes that ``cfg`` asks for.

    Args:
        cfg: as composed; written to ``resolved.yaml`` in the run directory, which the workers read.

    Raises:
        ConfigError: several machines, but no place to meet.
        TimeoutError: they do not meet there.
        WorkerFailed: one of them failed; the message names its rank and says its error.
        SystemExit: they were asked to end by a signal, and did.
    """
    wanted = plan(cfg)
    config = Path(cfg.paths.output_dir) / "resolved.yaml"
    if cfg.get("slurm") is not None:
        from detseg.engine.processes.slurm import submit

        write_config(cfg, config, wanted)
        return submit(config, wanted, cfg.slurm, name=str(cfg.name))
    if wanted.nodes > 1:
        from detseg.engine.processes.together import launch_together

        return launch_together(cfg, wanted)
    write_config(cfg, config, wanted)
    return launch_here(config, wanted)


def launch_here(config: Path, wanted: Plan) -> Outcome:
    """Train in processes of this machine, which read ``config``; see ``launch``."""
    # Addresses, as names of machines do not resolve everywhere; port 0: the agent takes a free one.
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--rdzv-id=detseg"]
    with tempfile.TemporaryDirectory(prefix="detseg-") as name:
        place = Path(name)
        code = attend(agent_command(wanted, config, meeting), environment(wanted, place), place, workers=wanted.local)
        problem = trouble(place, code)
        if problem is not None:
            tell(problem)
            raise problem
        return outcome_of(desk.take("outcome.json", place))


def agent_command(wanted: Plan, config: Path, meeting: Sequence[str]) -> list[str]:
    """Return the command that starts the workers of this machine; ``meeting``: ``torchrun``'s arguments for that."""
    ranks = [f"--nnodes={wanted.nodes}", f"--nproc-per-node={wanted.local}"]
    worker = ["-m", "detseg.engine.processes.worker", "--config", str(config.absolute())]
    return [sys.executable, "-m", "detseg.engine.processes.agent", *ranks, *meeting, *worker]


def environment(wanted: Plan, place: Path) -> dict[str, str]:
    """Return the environment of the agent and its workers; what the user set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {desk.DESK: str(place), desk.LAUNCHER: str(os.getpid()), desk.LOG_FILE: _log_file()}
    wishes = {
        "OMP_NUM_THREADS": str(max(1, cores // wanted.local)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # seconds that the others have when one has failed
    }
    if wanted.nodes == 1:  # else gloo looks for this machine's name, which not every network knows
        wishes["GLOO_SOCKET_IFNAME"] = _loopback()
    return wishes | dict(os.environ) | own


def _loopback() -> str:
    import socket

    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _log_file() -> str:
    """Return the file that this process logs to, as Hydra set it up; empty if there is none."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return files[0].baseFilename if files else ""


def attend(
    command: list[str],
    env: Mapping[str, str],
    place: Path,
    *,
    workers: int,
    started: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> int:
    """Run the agent to its end, passing on signals; return its exit code.

    Args:
        command: starts the agent.
        env: its environment.
        place: the desk.
        workers: how many of them will say that they are there.
        started: is given the agent once it runs.
    """
    # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on.
    agent = subprocess.Popen(command, env=dict(env), start_new_session=True)
    if started is not None:
        started(agent)
    try:
        with forwarding(agent, place, workers) as sent:
            code = agent.wait()
    finally:
        end(agent)
    if sent:
        desk.put(desk.TOLD, sent[0], place)
    if code and sent and not desk.take_all("rank_*.json", place):  # before anybody could save anything
        raise SystemExit(128 + sent[0])
    return code


@contextmanager
def forwarding(agent: subprocess.Popen[bytes], place: Path, workers: int) -> Iterator[list[int]]:
    """Pass signals on to the workers while the agent runs; where they cannot take them yet, end the agent.

    Yields:
        the signals that came.
    """
    sent: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        pids = desk.take_all("pid_*", place)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number != signal.SIGUSR1 or len(pids) < workers:
            threading.Thread(target=_lose_patience, args=(agent, PATIENCE), daemon=True).start()
        if len(pids) < workers:  # still importing: there is nothing to save
            agent.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # as in a notebook's executor; no signals come here
        yield sent
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lose_patience(agent: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        agent.wait(seconds)
        return
    end(agent)


def end(agent: subprocess.Popen[bytes]) -> None:
    """Kill the agent and its workers, which are a process group each, if any are left."""
    if agent.poll() is None:
        agent.terminate()
        with suppress(subprocess.TimeoutExpired):
            agent.wait(15)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def trouble(place: Path, code: int) -> WorkerFailed | SystemExit | None:
    """Return what went wrong with this machine's workers, if anything did; see ``launch``.

    Args:
        place: the desk.
        code: of the agent.
    """
    notes: list[dict[str, Any]] = desk.take_all("rank_*.json", place)
    report: dict[str, Any] = desk.take("agent.json", place) or {}
    ends = [note["code"] for note in notes if _in_order(note)]
    if ends and (desk.take(desk.TOLD, place) is not None or not _broke(notes, report)):
        return SystemExit(ends[0])
    return None if code == 0 and notes else failure(notes, report, code)


def _in_order(note: Mapping[str, Any]) -> bool:
    """Say whether a worker was asked to end and did; with 0 Slurm starts it anew."""
    return note["code"] in ASKED or (note["ended"] and note["code"] == 0)


def _broke(notes: list[dict[str, Any]], report: Mapping[str, Any]) -> bool:
    """Say whether a worker failed or was killed: then it was the agent that asked the others to end."""
    failed = any(note["code"] and not _in_order(note) and not _lost_peer(note) for note in notes)
    return failed or any(item["code"] < 0 and -item["code"] != signal.SIGTERM for item in report.get("failures", []))


def tell(problem: WorkerFailed | SystemExit) -> None:
    """Print where an error arose, if it is none that a user can mend."""
    trace = getattr(problem, "trace", "")
    if trace:
        print(trace, file=sys.stderr)


def outcome_of(left: Mapping[str, Any]) -> Outcome:
    """Return the outcome that the first worker put down."""
    paths = {key: left[key] for key in PATHS}
    checkpoint = None if paths["checkpoint"] is None else Path(paths["checkpoint"])
    files = [Path(path) for path in paths["files"]]
    return Outcome(**dict(left) | {"directory": Path(paths["directory"]), "checkpoint": checkpoint, "files": files})


def failure(notes: list[dict[str, Any]], report: Mapping[str, Any], code: int) -> WorkerFailed:
    """Return the error that names who failed first.

    Args:
        notes: of the workers that could leave one.
        report: of the agent: what it saw.
        code: of the agent.
    """
    killed = [item for item in report.get("failures", []) if item["code"] < 0]
    if any(note["code"] and not _lost_peer(note) for note in notes):  # the agent ends the others of one that failed
        killed = [item for item in killed if -item["code"] != signal.SIGTERM]
    if killed:  # its neighbours' errors about a lost connection follow from that
        first = min(killed, key=lambda item: item["time"])
        name = signal.Signals(-first["code"]).name
        return WorkerFailed(
            f"rank {first['rank']} (process {first['pid']}) was ended by {name}"
            f"{'; the system does that where memory runs out' if name == 'SIGKILL' else ''}; all processes of the run "
            "were ended",
            code=128 - first["code"],
        )
    failed = sorted(
        (note for note in notes if note["code"] and not _in_order(note)),
        key=lambda note: (_lost_peer(note), note["time"]),
    )
    if failed:
        first = failed[0]
        said = f"rank {first['rank']}: {first['message']}"
        return WorkerFailed(
            said, code=first["code"], kind=first["kind"], follows=_lost_peer(first), trace=first["trace"]
        )
    for item in report.get("failures", []):
        return WorkerFailed(f"rank {item['rank']} (process {item['pid']}) ended with {item['code']}", code=item["code"])
    return WorkerFailed(f"the workers did not start: {report.get('error', f'the agent ended with {code}')}", code=1)


def _lost_peer(note: Mapping[str, Any]) -> bool:
    """Say whether a worker failed because another one had."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "recvBytes")
    return any(word in note["message"] for word in words)
