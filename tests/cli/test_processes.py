"""Runs of several processes, started as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import detseg
from processes import DETSEG, TINY, alive, environment, family, started, wait_for, workers

pytestmark = pytest.mark.slow

LONG = [*TINY, "trainer.max_epochs=2000", "trainer.check_val_every_n_epoch=1000"]


def detseg_train(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    flags = [text for text in arguments if text.startswith("-")]
    command = [DETSEG, "train", *flags, *TINY, *(text for text in arguments if text not in flags)]
    return subprocess.run(
        command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=400, check=False
    )


def test_two_processes_train_one_model_in_one_directory(tmp_path: Path):
    """Five validation images on two ranks: three and two."""
    done = detseg_train(tmp_path, "trainer=ddp_cpu", "name=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1, "both processes print"
    assert "learning rate 0.002828: 0.002 is for 2 images a step, there are 4" in done.stdout
    assert "sync_dist" not in done.stderr
    (run,) = tmp_path.glob("runs/*/*")
    steps = [line for line in (run / "csv" / "metrics.csv").read_text().splitlines()[1:] if line]
    assert len(steps) >= 2
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["count"] > 0 and figures["loss"] > 0
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2  # eight images, two of them on each of two ranks
    assert detseg.load(run / "checkpoints" / "best.ckpt").class_names == ["apple", "pear", "orange"]
    assert "epoch 1/1" in (run / "train.log").read_text() or "FCOS" in (run / "train.log").read_text()
    assert not list(tmp_path.glob("runs/*/*/.resolved*")), "files on their way are left"


def test_ranks_of_a_sweep_read_one_config_in_one_directory_per_trial(tmp_path: Path):
    """A relaunch of the command line, which Lightning does, would give each rank a directory of its own."""
    (tmp_path / "spy.py").write_text(SPY)
    done = detseg_train(
        tmp_path, "-m", "trainer=ddp_cpu", "optimizer.lr=1e-3,2e-3", "name=sweep", "allow=[spy]",
        "optimizer._target_=spy.Spy", "lr_rule=none", PYTHONPATH=str(tmp_path), SPY=str(tmp_path / "seen"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = sorted(path.parent for path in tmp_path.glob("runs/*/*/*/resolved.yaml"))
    assert [trial.name for trial in trials] == ["optimizer.lr=0.001", "optimizer.lr=0.002"]
    assert len(list(tmp_path.glob("runs/*/*"))) == 1, "a rank made a directory of its own"
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    for trial in trials:
        resolved = yaml.safe_load((trial / "resolved.yaml").read_text())
        same = [(rank, rate, where) for rank, rate, where in seen if where == str(trial)]
        assert {rank for rank, *_ in same} == {"0", "1"}
        assert {rate for _, rate, _ in same} == {resolved["optimizer"]["lr"]}
    assert len({where for *_, where in seen}) == 2


SPY = """
import json, os, sys, yaml, torch

class Spy(torch.optim.AdamW):
    def __init__(self, params, **settings):
        path = sys.argv[sys.argv.index("--config") + 1]
        config = yaml.safe_load(open(path))
        if "LOCAL_RANK" in os.environ:
            with open(os.environ["SPY"], "a") as file:
                file.write(json.dumps([os.environ["RANK"], settings["lr"], config["paths"]["output_dir"]]) + "\\n")
        super().__init__(params, **settings)
"""


def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path):
    with started([DETSEG, "train", *LONG, "trainer=ddp_cpu", "name=killed"], tmp_path) as launcher:
        wait_for(lambda: "epoch 1/" in (tmp_path / "out.txt").read_text())
        ranks = workers(launcher.pid)
        everybody = family(launcher.pid)
        assert sorted(ranks) == [0, 1]
        ranks[1].kill()
        begin = time.monotonic()
        launcher.wait(60)
        assert time.monotonic() - begin < 15
        assert launcher.returncode == 128 + signal.SIGKILL
        assert alive(everybody) == []
        said = (tmp_path / "out.err").read_text()
        assert re.search(rf"^detseg: rank 1 \(process {ranks[1].pid}\) was ended by SIGKILL", said, re.MULTILINE)
        assert "Traceback" not in said.split("detseg: rank 1")[1]


def test_a_killed_launcher_leaves_nobody(tmp_path: Path):
    with started([DETSEG, "train", *LONG, "trainer=ddp_cpu", "name=orphans"], tmp_path) as launcher:
        wait_for(lambda: "epoch 1/" in (tmp_path / "out.txt").read_text())
        everybody = family(launcher.pid)
        assert len(everybody) >= 3
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not alive(everybody), 40)
        (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
        assert torch.load(checkpoint, weights_only=True)["global_step"] > 0


def test_a_rank_that_fails_says_so_in_one_line(tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILING)
    more = ["trainer=ddp_cpu", "allow=[failing]", "optimizer._target_=failing.Failing"]
    done = detseg_train(tmp_path, *more, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "detseg: rank 1: no luck on this one" in done.stderr
    assert "(ValueError; DETSEG_DEBUG=1 shows where it arose)" in done.stderr
    assert "Traceback" not in done.stderr


FAILING = """
import os, torch

class Failing(torch.optim.AdamW):
    def __init__(self, params, **settings):
        if os.environ.get("RANK") == "1":
            raise ValueError("no luck on this one")
        super().__init__(params, **settings)
"""


def test_sigterm_reaches_the_workers_which_save(tmp_path: Path):
    with started([DETSEG, "train", *LONG, "trainer=ddp_cpu", "name=told"], tmp_path) as launcher:
        wait_for(lambda: "epoch 1/" in (tmp_path / "out.txt").read_text())
        everybody = family(launcher.pid)
        launcher.terminate()
        launcher.wait(60)
        assert launcher.returncode == 143, (tmp_path / "out.err").read_text()
        assert alive(everybody) == []
        (run,) = tmp_path.glob("runs/*/*")
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0
        assert not (run / "metrics.json").exists(), "the run looks finished"


def namespaces(prefix: str) -> None:
    """Make two network namespaces with a cable between them: 192.0.2.1 and 192.0.2.2."""
    for number in (1, 2):
        subprocess.run(["ip", "netns", "add", f"{prefix}{number}"], check=True, capture_output=True)
    ends = [f"{prefix}v1", "type", "veth", "peer", "name", f"{prefix}v2"]
    subprocess.run(["ip", "link", "add", *ends], check=True, capture_output=True)
    for number in (1, 2):
        space, end = f"{prefix}{number}", f"{prefix}v{number}"
        subprocess.run(["ip", "link", "set", end, "netns", space], check=True)
        inside = ["ip", "-n", space]
        subprocess.run([*inside, "addr", "add", f"192.0.2.{number}/24", "dev", end], check=True)
        for name in (end, "lo"):
            subprocess.run([*inside, "link", "set", name, "up"], check=True)


@pytest.fixture
def hosts() -> object:
    """Two machines: commands that run what follows on one of them, and the address where they meet."""
    prefix = f"ds{os.getpid() % 10000}"
    try:
        namespaces(prefix)
    except (OSError, subprocess.CalledProcessError):
        _remove(prefix)
        pytest.skip("network namespaces need root and iproute2")
    yield [["ip", "netns", "exec", f"{prefix}{number}"] for number in (1, 2)]
    _remove(prefix)


def _remove(prefix: str) -> None:
    for number in (1, 2):
        subprocess.run(["ip", "netns", "del", f"{prefix}{number}"], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", f"{prefix}v1"], check=False, capture_output=True)


def test_two_hosts_train_one_model_through_the_rendezvous(tmp_path: Path, hosts: list[list[str]]):
    """Each in a network of its own, joined by a cable; the same command on both, the second one first."""
    meeting = ["launcher=torchrun", "nodes=2", "rdzv=192.0.2.1:29400", "trainer=ddp_cpu", "trainer.devices=1"]
    command = [DETSEG, "train", *TINY, *meeting, "name=hosts"]
    with started([*hosts[1], *command], tmp_path, name="b") as second:
        time.sleep(1)
        with started([*hosts[0], *command], tmp_path, name="a") as first:
            assert first.wait(200) == 0, (tmp_path / "a.err").read_text()
            assert second.wait(60) == 0, (tmp_path / "b.err").read_text()
    (run,) = tmp_path.glob("runs/*/*")  # that of the first; what the second composed is gone
    assert json.loads((run / "metrics.json").read_text())["count"] > 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    texts = [(tmp_path / f"{name}.txt").read_text() for name in "ab"]
    assert "epoch 1/1" in texts[0] and "epoch 1/1" not in texts[1]
    assert str(run) in texts[1], "the second host does not say where the run is"


def test_a_lost_host_ends_the_run_on_the_other(tmp_path: Path):
    """Two launchers on this machine; everything of one of them is killed."""
    port = 29400 + os.getpid() % 1000
    meeting = ["launcher=torchrun", "nodes=2", f"rdzv=127.0.0.1:{port}", "trainer=ddp_cpu", "trainer.devices=1"]
    command = [DETSEG, "train", *LONG, *meeting, "name=lost"]
    with started(command, tmp_path, name="a") as first, started(command, tmp_path, name="b") as second:
        texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
        wait_for(lambda: any("epoch 1/" in text.read_text() for text in texts))
        leads = "epoch 1/" in texts[0].read_text()
        lost, left, err = (second, first, "a.err") if leads else (first, second, "b.err")
        everybody = family(left.pid)
        for process in [psutil.Process(lost.pid), *family(lost.pid).values()]:
            with suppress(psutil.NoSuchProcess):  # gone with those before it
                process.kill()
        begin = time.monotonic()
        left.wait(60)
        assert time.monotonic() - begin < 30
        assert left.returncode not in (0, None)
        assert alive(everybody) == []
        assert re.search(r"detseg: .*(machine 1|rank 0)", (tmp_path / err).read_text())
