"""Starts runs of ``noisy_run`` in processes of their own and kills them; ``python killed_runs.py <plan.json>``.

Lightning is imported once, by this program, which forks a child per trial: a trial then costs a fraction of a second.
A plan is a list of trials: ``{"directory", "name", "resume", "options", "signal", "after"}``; the signal is sent once
the child's trace has ``after`` lines. The exit codes are printed as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 60.0  # seconds that a trial may take


def child(trial: dict[str, Any]) -> None:
    import torch
    from lightning.pytorch.callbacks import Callback

    import noisy_run
    from detseg.callbacks import Shutdown
    from detseg.callbacks.signals import listening
    from detseg.durable import newest_valid

    class Slow(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            time.sleep(trial.get("slow", 0))

    torch.set_num_threads(1)
    directory = Path(trial["directory"])
    resume = newest_valid(directory / "checkpoints") if trial.get("resume") else None
    with listening():
        noisy_run.fit(directory, Shutdown(), Slow(), resume=resume, trace=noisy_run.Trace(directory / trial["name"]),
                      **trial.get("options", {}))  # fmt: skip


def run(trial: dict[str, Any]) -> int:
    """Run one trial; return its exit code, negative after a signal."""
    directory = Path(trial["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            sys.stderr = sys.stdout = (directory / f"{trial['name']}.log").open("w", buffering=1)
            os.dup2(sys.stderr.fileno(), 2)
            child(trial)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    started, sent, status = time.monotonic(), False, None
    while status is None:
        done, found = os.waitpid(pid, os.WNOHANG)
        status = found if done else None
        trace = directory / trial["name"]
        if (
            not sent
            and trial.get("signal")
            and trace.exists()
            and len(trace.read_text().splitlines()) >= trial["after"]
        ):
            sent = True
            target = -pid if trial.get("group") else pid
            for _ in range(trial.get("times", 1)):
                os.kill(target, trial["signal"]) if target > 0 else os.killpg(pid, trial["signal"])
                time.sleep(0.05)
        if time.monotonic() - started > LIMIT:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    try:  # data workers, which outlive a killed run by some seconds
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    import lightning.pytorch  # noqa: F401  # before the forks

    import noisy_run  # noqa: F401

    print(json.dumps([run(trial) for trial in json.loads(Path(sys.argv[1]).read_text())]))
