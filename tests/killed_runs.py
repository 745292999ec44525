"""Starts runs of ``noisy_run`` in processes of their own and kills them: ``run``, or ``killed_runs.py <plan.json>``.

What Lightning and torch take to be imported is spent once, before a child per trial is forked: a trial then costs a
fraction of a second. Where there is a GPU, which a process that forks may not have used, the program does it.
A plan is a list of trials: ``{"directory", "name", "resume", "options", "signal", "after"}``; the signal is sent once
the first child's trace has ``after`` lines. The exit codes are printed as JSON. Further keys: ``ranks`` (processes that
train together), ``to`` (which gets the signal), ``stop`` (which is stopped before, so that the others wait for it),
``group``, ``times``, ``slow`` (seconds per validation batch), ``stuck`` (seconds per training batch from ``after`` on),
``grace``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from detseg.data.loader import one_opencv_thread
from forks import plain_logging

LIMIT = 60.0  # seconds that a trial may take


def child(trial: dict[str, Any], rank: int) -> None:
    import torch
    from lightning.pytorch.callbacks import Callback

    import noisy_run
    from detseg.callbacks import Shutdown
    from detseg.callbacks.signals import listening
    from detseg.durable import newest_valid

    class Slow(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            time.sleep(trial.get("slow", 0))

        def on_train_batch_end(self, *_: Any) -> None:
            if len(trace.lines) >= trial.get("after", 0):
                time.sleep(trial.get("stuck", 0))

    torch.set_num_threads(1)
    directory, name = Path(trial["directory"]), trial["name"] if rank == 0 else f"{trial['name']}.{rank}"
    trace = noisy_run.Trace(directory / name)
    resume = newest_valid(directory / "checkpoints") if trial.get("resume") else None
    with listening():
        noisy_run.fit(
            directory, Shutdown(grace=trial.get("grace", 10)), Slow(), resume=resume,
            trace=trace, **trial.get("options", {}),
        )  # fmt: skip


def fork(trial: dict[str, Any], rank: int, port: int) -> int:
    """Start one process of a trial; return its id."""
    with one_opencv_thread():  # of its threads a child has none, and its data workers would wait for them
        pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    ranks = trial.get("ranks", 1)
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({key: str(value) for key, value in (own | meet).items()})
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    code = 1
    try:
        plain_logging()
        sys.stderr = sys.stdout = (Path(trial["directory"]) / f"{trial['name']}.{rank}.log").open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        child(trial, rank)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(trial: dict[str, Any]) -> list[int]:
    """Run one trial; return the exit codes of its processes, negative after a signal."""
    directory = Path(trial["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork(trial, rank, port) for rank in range(trial.get("ranks", 1))]
    codes: dict[int, int] = {}
    started, sent = time.monotonic(), not trial.get("signal")
    while len(codes) < len(pids):
        for pid in pids:
            done, found = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(found)
        trace = directory / trial["name"]
        if not sent and trace.exists() and len(trace.read_text().splitlines()) >= trial["after"]:
            sent = True
            tell(trial, pids)
        if trial.get("stop") is not None and len(codes) == len(pids) - 1:
            os.kill(pids[trial["stop"]], signal.SIGKILL)
        if time.monotonic() - started > LIMIT:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    for pid in pids:  # data workers, which outlive a killed run by some seconds
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def tell(trial: dict[str, Any], pids: list[int]) -> None:
    """Send the trial's signal to the process that it names, or to its group."""
    if trial.get("stop") is not None:
        os.kill(pids[trial["stop"]], signal.SIGSTOP)
    for _ in range(trial.get("times", 1)):
        target = pids[trial.get("to", 0)]
        (os.killpg if trial.get("group") else os.kill)(target, trial["signal"])
        time.sleep(0.05)


if __name__ == "__main__":
    import lightning.pytorch  # noqa: F401  # before the forks

    import noisy_run  # noqa: F401

    print(json.dumps([code for trial in json.loads(Path(sys.argv[1]).read_text()) for code in run(trial)]))
