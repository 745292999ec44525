"""``launcher=slurm``: a trial as a Slurm job, through submitit.

The config is composed and resolved where the command is typed; the job's tasks, one per machine, start the workers as
``launcher=torchrun`` does. A job that Slurm is about to end gets SIGUSR1, upon which its workers save and have it
queued again; it then goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError
from detseg.engine.errors import WorkerFailed, exit_code, said
from detseg.engine.processes.launch import launch_here, outcome_of
from detseg.engine.processes.meeting import meet
from detseg.engine.processes.plan import Plan
from detseg.engine.processes.together import follow, lead
from detseg.engine.processes.worker import plain_outcome
from detseg.experiment import Outcome

log = logging.getLogger(__name__)

SIGNAL = "USR1"
"""What Slurm sends before a job's time is over; submitit's own choice would be USR2."""

PORTS = 20000, 20000
"""Ports where the machines of a job meet: the first, and how many; the job's number chooses one."""

REQUEUE = 300.0
"""Seconds that Slurm has to end the processes of a job that it queues again."""

POLL = 1.0
"""Seconds between two looks at a job."""


def submit(config: Path, wanted: Plan, options: DictConfig, *, name: str) -> Outcome:
    """Submit a job that trains as ``config`` says, and wait for it if the options say so.

    Args:
        config: ``resolved.yaml`` in the run directory, which the machines share.
        wanted: the processes.
        options: the key ``slurm``.
        name: of the job.

    Returns:
        The job's outcome; without waiting, one without figures.

    Raises:
        ImportError: submitit is not installed.
        ConfigError: there is no Slurm here.
        WorkerFailed: the job failed.
        SystemExit: this process was told to end; the job is cancelled then.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError("launcher=slurm needs submitit: pip install detseg[slurm]") from error
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    folder = config.parent / "slurm"
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
    except RuntimeError as error:
        raise ConfigError(
            "launcher=slurm: this machine has no srun; type the command where jobs are submitted"
        ) from error
    gpu = str(OmegaConf.load(config).trainer.accelerator) in ("gpu", "cuda")
    executor.update_parameters(**parameters(options, wanted, name=name, gpu=gpu))
    job = executor.submit(run_node, str(config.absolute()), wanted.local, wanted.nodes)
    log.info("Slurm job %s: %s", job.job_id, config.parent)
    if not options.wait:
        return Outcome(directory=config.parent, files=[folder])
    with cancelled_by_signals(job):
        while not job.done():
            time.sleep(POLL)
    return conclude(job, folder)


def parameters(options: DictConfig, wanted: Plan, *, name: str, gpu: bool) -> dict[str, Any]:
    """Return what submitit makes ``sbatch``'s options of, without those that are ``null``."""
    gpus = options.gpus_per_node if options.gpus_per_node is not None else wanted.local if gpu else None
    chosen = {
        "job_name": name,
        "nodes": wanted.nodes,
        "ntasks_per_node": 1,  # it starts the others
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "signal_delay_s": options.signal_delay,
        "cpus_per_task": options.cpus_per_node,
        "mem": None if options.mem_gb is None else f"{options.mem_gb}GB",
        "gpus_per_node": gpus,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "setup": list(options.setup) or None,
        # USR1 by name: submitit reads its variable when it is imported, which may have been before.
        "additional_parameters": {"signal": f"{SIGNAL}@{options.signal_delay}", **_pairs(options.additional)},
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _pairs(options: Sequence[str]) -> dict[str, str]:
    """Return ``name=value`` strings as a dict.

    Raises:
        ConfigError: one has no ``=``.
    """
    for text in options:
        if "=" not in text:
            raise ConfigError(f"slurm.additional: {text!r} is not name=value, such as gres=tmp:9")
    return {name: value for name, _, value in (text.partition("=") for text in options)}


def run_node(config: str, local: int, nodes: int) -> dict[str, Any]:
    """Run one machine's share of a job, on that machine; return the outcome or the problem as plain values.

    Args:
        config: ``resolved.yaml``.
        local: processes on each machine.
        nodes: machines.
    """
    import submitit

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = submitit.JobEnvironment()
    port = PORTS[0] + int("".join(filter(str.isdigit, place.raw_job_id))) % PORTS[1]
    wanted = Plan(local=local, nodes=nodes, rendezvous=f"{place.hostnames[0]}:{port}" if nodes > 1 else "")
    try:
        return {"outcome": plain_outcome(_run(Path(config), wanted))}
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if code == 0:  # queued again: Slurm ends this process, and a result now would be taken for the job's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(REQUEUE)
        return {"problem": {"code": code, "kind": "SystemExit", "message": ""}}
    except (WorkerFailed, ConfigError, OSError) as error:
        kind = error.kind if isinstance(error, WorkerFailed) else type(error).__name__
        return {"problem": {"code": exit_code(error), "kind": kind, "message": said(error)}}


def _run(config: Path, wanted: Plan) -> Outcome:
    if wanted.nodes == 1:
        return launch_here(config, wanted)
    meeting = meet(wanted.rendezvous, wanted.nodes)
    try:
        return follow(meeting) if meeting.node else lead(config, wanted, meeting)
    finally:
        meeting.close()


def conclude(job: Any, folder: Path) -> Outcome:
    """Return what the job's first machine returned, or raise its problem.

    Args:
        job: submitit's, which has ended.
        folder: of its logs.

    Raises:
        WorkerFailed: the job failed, or was ended from outside.
        SystemExit: the run ended in order before its time.
    """
    from submitit.core.utils import UncompletedJobError

    try:
        found: Mapping[str, Any] = job.results()[0]
    except UncompletedJobError as error:
        state = f"Slurm job {job.job_id} left no result (state {job.state}); its output is in {folder}"
        raise WorkerFailed(state) from error
    problem = found.get("problem")
    if problem is None:
        return outcome_of(found["outcome"])
    if problem["kind"] == "SystemExit":
        raise SystemExit(problem["code"])
    raise WorkerFailed(f"Slurm job {job.job_id}: {problem['message']}", code=problem["code"], kind=problem["kind"])


@contextmanager
def cancelled_by_signals(job: Any) -> Iterator[None]:
    """Cancel a job when this process is told to end while it waits."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread: signals go elsewhere
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit:
        job.cancel(check=False)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
