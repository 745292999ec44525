"""Launching the processes of a run on several machines: what each launcher does once they have met."""

from __future__ import annotations

import logging
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from detseg.engine.errors import WorkerFailed
from detseg.engine.processes import desk
from detseg.engine.processes.launch import agent_command, attend, environment, outcome_of, tell, trouble
from detseg.engine.processes.meeting import (
    WAIT,
    Meeting,
    address,
    discard,
    free_port,
    interface,
    meet,
    own_address,
    wait_for_others,
)
from detseg.engine.processes.plan import Plan, write_config
from detseg.experiment import Outcome

log = logging.getLogger(__name__)

PARTING = 15.0
"""Seconds that a launcher waits for what the others have to say when its own workers have ended."""


def launch_together(cfg: DictConfig, wanted: Plan) -> Outcome:
    """Train on several machines; this one may be any of them. See ``detseg.engine.processes.launch.launch``."""
    meeting = meet(wanted.rendezvous, wanted.nodes)
    try:
        if meeting.node:
            return follow(meeting, Path(cfg.paths.output_dir))
        config = Path(cfg.paths.output_dir) / "resolved.yaml"
        write_config(cfg, config, wanted)
        return lead(config, wanted, meeting)
    finally:
        meeting.close()


def lead(config: Path, wanted: Plan, meeting: Meeting) -> Outcome:
    """Tell the other machines what to run, run the own share, and say how it ended."""
    wait_for_others(meeting)
    text = config.read_text(encoding="utf-8")
    meeting.put("task", {"config": text, "directory": str(config.parent.absolute()), "local": wanted.local})
    meeting.put("port", free_port())
    with tempfile.TemporaryDirectory(prefix="detseg-") as name:
        problem, left = share(meeting, wanted, config, Path(name))
    if isinstance(problem, WorkerFailed):
        problem = first_failure(meeting, problem)
        tell(problem)
    meeting.put("end", {"outcome": left, "problem": None if problem is None else _plain(problem)})
    _wait_for_goodbyes(meeting)
    if problem is not None:
        raise problem
    assert left is not None  # without a problem the first worker has left one
    return outcome_of(left)


def follow(meeting: Meeting, composed: Path | None = None) -> Outcome:
    """Run what the first machine says, and take the outcome from it.

    Args:
        meeting: of the machines.
        composed: directory of the run that was composed here, which is not what is run.
    """
    task = meeting.take("task", WAIT)
    if task is None:
        raise TimeoutError(f"rdzv={meeting.place}: the first machine said nothing within {WAIT:.0f} s")
    log.info("machine %d of the run in %s", meeting.node, task["directory"])
    if composed is not None and composed.absolute() != Path(task["directory"]):
        discard(composed.absolute())
    with tempfile.TemporaryDirectory(prefix="detseg-") as name:
        config = Path(name) / "resolved.yaml"
        config.write_text(task["config"], encoding="utf-8")
        wanted = Plan(local=int(task["local"]), nodes=meeting.nodes, rendezvous=meeting.place)
        problem, _ = share(meeting, wanted, config, Path(name))
    end = meeting.take("end", PARTING)
    if end is None:
        raise problem or WorkerFailed(f"the machine that has {meeting.place} is gone")
    meeting.store.add(f"{meeting.trial}/goodbye", 1)
    if end["problem"] is not None:
        raise _problem(end["problem"])
    return outcome_of(end["outcome"])


def share(
    meeting: Meeting, wanted: Plan, config: Path, place: Path
) -> tuple[WorkerFailed | SystemExit | None, dict[str, Any] | None]:
    """Run this machine's workers; return what went wrong, and what the first worker left where it ran here."""
    port = meeting.take("port", WAIT)
    host = address(meeting.place)[0]
    ranks = [f"--node-rank={meeting.node}", "--rdzv-backend=static", f"--rdzv-endpoint={host}:{port}"]
    own = own_address(meeting.place)
    network = interface(own)
    env = ({"GLOO_SOCKET_IFNAME": network} if network else {}) | environment(wanted, place)

    def started(agent: subprocess.Popen[bytes]) -> None:
        meeting.watch(agent.terminate)

    command = agent_command(wanted, config, [*ranks, f"--local-addr={own}", f"--rdzv-id=detseg{meeting.trial}"])
    code = attend(command, env, place, workers=wanted.local, started=started)
    problem = trouble(place, code)
    if meeting.failed and (isinstance(problem, SystemExit) or code > 128):  # it was the watch that ended them
        problem = WorkerFailed(f"{meeting.failed}; all processes of the run were ended", follows=True)
    if isinstance(problem, WorkerFailed) and meeting.node:
        meeting.put(f"failed/{meeting.node}", _plain(problem))
    elif isinstance(problem, WorkerFailed):
        meeting.put("failed/0", {})
    return problem, desk.take("outcome.json", place)


def first_failure(meeting: Meeting, own: WorkerFailed) -> WorkerFailed:
    """Return the failure from which the others follow, of all machines."""
    if not own.follows:
        return own
    end = time.monotonic() + PARTING
    for node in range(1, meeting.nodes):
        if meeting.failed:
            break
        found = meeting.take(f"failed/{node}", max(0.2, end - time.monotonic()))
        if found is not None and not found["follows"]:
            own = WorkerFailed(f"machine {node}, {found['message']}", code=found["code"], kind=found["kind"])
            own.trace = found["trace"]
            return own
    return WorkerFailed(f"{meeting.failed}; all processes of the run were ended") if meeting.failed else own


def _wait_for_goodbyes(meeting: Meeting) -> None:
    end = time.monotonic() + PARTING
    while int(meeting.store.add(f"{meeting.trial}/goodbye", 0)) < meeting.nodes - 1:
        if time.monotonic() > end or "sign of life" in meeting.failed:
            break
        time.sleep(0.1)


def _plain(problem: WorkerFailed | SystemExit) -> dict[str, Any]:
    if isinstance(problem, SystemExit):
        return {"message": "", "code": problem.code, "kind": "SystemExit", "follows": False, "trace": ""}
    own = {"message": str(problem), "code": problem.code, "kind": problem.kind}
    return {**own, "follows": problem.follows, "trace": problem.trace}


def _problem(plain: dict[str, Any]) -> WorkerFailed | SystemExit:
    if plain["kind"] == "SystemExit":
        return SystemExit(plain["code"])
    return WorkerFailed(plain["message"], code=plain["code"], kind=plain["kind"])
