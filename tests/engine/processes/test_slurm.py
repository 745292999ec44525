"""``launcher=slurm`` against programs that answer as Slurm's do."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from detseg.config import ConfigError, load_config
from detseg.engine.processes.plan import Plan
from detseg.engine.processes.slurm import parameters, submit
from processes import DETSEG, TINY, environment, started, wait_for

SBATCH = """
echo "$@" >> $FAKE/sbatch.log; cp "$1" $FAKE/script.sh
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=127.0.0.1,127.0.0.1 SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=2
setsid bash "$1" > $FAKE/job.log 2>&1 < /dev/null &
echo $! > $FAKE/job.pid
echo "Submitted batch job 4711"
"""
SRUN = """
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" > $FAKE/node$node.log 2>&1 &
done
wait
"""
ALONE = """
cp "$1" $FAKE/script.sh
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=127.0.0.1 SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1
setsid bash -c 'bash $0; if [ -e $FAKE/scontrol.log ]; then SLURM_RESTART_COUNT=1 bash $0; fi' "$1" \
  >> $FAKE/job.log 2>&1 < /dev/null &
echo $! > $FAKE/job.pid
echo "Submitted batch job 4711"
"""
TASK = """
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
"$@" >> $FAKE/node0.log 2>&1 &
echo $! > $FAKE/task.pid
wait
"""
SCONTROL = """
echo "$@" >> $FAKE/scontrol.log
task=$(cat $FAKE/task.pid)
(sleep 1; while kill -TERM $task; do sleep 0.5; done) > /dev/null 2>&1 &
"""
SACCT = 'echo "JobID|State"; echo "4711|RUNNING"'


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "sacct": SACCT,
        "scancel": 'echo "$@" >> $FAKE/scancel.log',
    }.items():
        program(folder, name, text)
    return folder


def test_options_of_sbatch_are_those_that_are_set():
    cfg = load_config(
        "launcher=slurm", "nodes=2", "slurm.partition=gpu", "slurm.mem_gb=64", "slurm.additional=['gres=tmp:9']"
    )
    found = parameters(cfg.slurm, Plan(local=4, nodes=2), name="orchard", gpu=True)
    assert found["nodes"] == 2
    assert found["ntasks_per_node"] == 1
    assert found["gpus_per_node"] == 4
    assert found["mem"] == "64GB"
    assert found["partition"] == "gpu"
    assert found["additional_parameters"] == {"signal": "USR1@120", "gres": "tmp:9"}
    with pytest.raises(ConfigError, match="'gres' is not name=value"):
        parameters(load_config("launcher=slurm", "slurm.additional=[gres]").slurm, Plan(local=1), name="a", gpu=False)
    assert "account" not in found and "qos" not in found
    assert "gpus_per_node" not in parameters(cfg.slurm, Plan(local=4, nodes=2), name="orchard", gpu=False)


def test_without_slurm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "resolved.yaml").write_text("trainer: {accelerator: cpu}")
    with pytest.raises(ConfigError, match="this machine has no srun"):
        submit(tmp_path / "resolved.yaml", Plan(local=1), OmegaConf.create({"wait": True}), name="none")
    assert not list(tmp_path.glob("*.pkl"))


@pytest.mark.slow
def test_a_job_on_two_machines_trains_one_model(tmp_path: Path, cluster: Path):
    pytest.importorskip("submitit")
    env = environment(PATH=f"{cluster}:{os.environ['PATH']}", FAKE=str(tmp_path))
    shape = ["launcher=slurm", "nodes=2", "trainer=ddp_cpu", "trainer.devices=1", "slurm.time=30", "name=job"]
    with started([DETSEG, "train", *TINY, *shape], tmp_path, env=env) as launcher:
        try:
            assert launcher.wait(240) == 0, (tmp_path / "out.err").read_text()
        finally:
            job = int((tmp_path / "job.pid").read_text()) if (tmp_path / "job.pid").exists() else 0
            if job:
                _kill_session(job)
    (run,) = tmp_path.glob("runs/*/*")
    said = (tmp_path / "out.txt").read_text()
    assert f"Slurm job 4711: {run}" in said
    assert "checkpoint" in said and "map_50" in said, "the job's figures are not shown"
    assert json.loads((run / "metrics.json").read_text())["count"] > 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    script = (tmp_path / "script.sh").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--time=30", "--signal=USR1@120", "--job-name=job"):
        assert f"#SBATCH {line}" in script
    assert str(Path(sys.executable).parent) in script
    logs = [(tmp_path / f"node{node}.log").read_text() for node in (0, 1)]
    assert sum("epoch 1/1" in log for log in logs) == 1


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_once_and_goes_on(tmp_path: Path, cluster: Path):
    """What Slurm does before the time is over: SIGUSR1 to the task, and SIGTERM once the job is queued again."""
    pytest.importorskip("submitit")
    for name, text in {"sbatch": ALONE, "srun": TASK, "scontrol": SCONTROL}.items():
        program(cluster, name, text)
    env = environment(PATH=f"{cluster}:{os.environ['PATH']}", FAKE=str(tmp_path))
    shape = ["launcher=slurm", "trainer=cpu", "trainer.max_epochs=40", "trainer.check_val_every_n_epoch=10"]
    log = tmp_path / "node0.log"
    with started([DETSEG, "train", *TINY, *shape, "logger=csv", "name=job"], tmp_path, env=env) as launcher:
        try:
            wait_for(lambda: log.exists() and "epoch 10/40" in log.read_text())
            os.kill(int((tmp_path / "task.pid").read_text()), signal.SIGUSR1)
            assert launcher.wait(240) == 0, (tmp_path / "out.err").read_text()
        finally:
            if (tmp_path / "job.pid").exists():
                _kill_session(int((tmp_path / "job.pid").read_text()))
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    (run,) = tmp_path.glob("runs/*/*")
    said = log.read_text()
    assert "told to end by SIGUSR1: step" in said and f"started again by Slurm: going on from {run}" in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 160
    assert json.loads((run / "metrics.json").read_text())["count"] > 0
    with (run / "csv" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(160)), "a step is missing or was logged twice"


def _kill_session(leader: int) -> None:
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                process.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
