"""What a launcher decides, writes and says; whole runs are in tests/cli/test_processes.py."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from torch import nn

from detseg.config import ConfigError, build, load_config
from detseg.engine.errors import WorkerFailed, exit_code, said
from detseg.engine.processes import desk, meeting
from detseg.engine.processes.launch import agent_command, environment, failure, trouble
from detseg.engine.processes.plan import Plan, launches, local_processes, plan, write_config
from detseg.experiment import check_start
from ranks import free_port


@pytest.mark.parametrize(
    ("overrides", "local", "nodes", "launched"),
    [
        (["trainer=cpu"], 1, 1, False),
        (["trainer=cpu", "trainer.strategy=ddp"], 1, 1, False),
        (["trainer=ddp_cpu"], 2, 1, True),
        (["trainer=ddp_cpu", "trainer.devices=3"], 3, 1, True),
        (["trainer=ddp_cpu", "trainer.devices=2", "trainer.strategy=ddp_spawn"], 2, 1, False),
        (["trainer=ddp", "trainer.devices=[0,2,3]"], 3, 1, True),
        (["trainer=ddp", 'trainer.devices="1,3"'], 2, 1, True),
        (["trainer=cpu", "trainer.num_nodes=2"], 1, 2, True),
        (["trainer=ddp_cpu", "launcher=torchrun", "nodes=3", "rdzv=192.0.2.1:29400"], 2, 3, True),
        (["trainer=cpu", "launcher=slurm"], 1, 1, True),
    ],
)
def test_processes_are_those_that_the_trainer_asks_for(overrides: list[str], local: int, nodes: int, launched: bool):
    cfg = load_config(*overrides)
    wanted = plan(cfg)
    assert (wanted.local, wanted.nodes, wanted.world) == (local, nodes, local * nodes)
    assert launches(cfg) is launched
    assert wanted.rendezvous == ("192.0.2.1:29400" if "launcher=torchrun" in overrides else "")


def test_a_worker_launches_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launches(load_config("trainer=ddp_cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launches(load_config("trainer=ddp_cpu"))


def test_what_is_drawn_is_settled_in_the_file_and_what_is_secret_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    cfg = load_config("trainer=ddp_cpu", "trainer.devices=auto", "task.monitor=${oc.env:MY_TOKEN}", "model=fcos_small")
    write_config(cfg, tmp_path / "run" / "resolved.yaml", Plan(local=4, nodes=2))
    written = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert written["paths"]["output_dir"] == cfg.paths.output_dir
    assert written["callbacks"]["checkpoint"]["dirpath"] == f"{cfg.paths.output_dir}/checkpoints"
    assert written["model"]["num_classes"] == "${data.num_classes}"  # the data say it, in the worker
    assert (written["trainer"]["devices"], written["trainer"]["num_nodes"]) == (4, 2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["resolved.yaml"]
    assert written["task"]["monitor"] == "${oc.env:MY_TOKEN}"
    assert "s3cret" not in (tmp_path / "run" / "resolved.yaml").read_text()


def test_the_workers_are_started_by_torchrun_with_the_resolved_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "99")
    command = agent_command(Plan(local=3), tmp_path / "resolved.yaml", ["--rdzv-id=x"])
    assert command[:3] == [sys.executable, "-m", "detseg.engine.processes.agent"]
    assert "--nproc-per-node=3" in command and "--nnodes=1" in command
    assert command[-4:] == ["-m", "detseg.engine.processes.worker", "--config", str(tmp_path / "resolved.yaml")]
    env = environment(Plan(local=10**6), tmp_path)
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "99", "what the user sets stays"
    assert env[desk.DESK] == str(tmp_path) and env[desk.LAUNCHER] == str(os.getpid())


def note(rank: int, code: int, message: str, time: float, kind: str = "RuntimeError", ended: bool = False) -> dict:
    return {"rank": rank, "code": code, "message": message, "time": time, "kind": kind, "ended": ended, "trace": ""}


def test_the_failure_named_is_the_one_that_others_follow_from():
    lost = note(0, 1, "[gloo] Connection closed by peer", 1.0)
    cause = note(1, 2, "there is no such file", 2.0, kind="FileNotFoundError")
    found = failure([lost, cause], {}, 1)
    assert (str(found), found.code, found.kind, found.follows) == (
        "rank 1: there is no such file", 2, "FileNotFoundError", False,
    )  # fmt: skip
    alone = failure([lost], {}, 1)
    assert alone.follows and str(alone).startswith("rank 0: [gloo]")


def test_a_signal_is_named_before_the_errors_that_follow():
    report = {
        "failures": [{"rank": 3, "code": -9, "pid": 77, "time": 5.0}, {"rank": 0, "code": 1, "pid": 7, "time": 1.0}]
    }
    found = failure([note(0, 1, "Connection closed by peer", 1.0)], report, 137)
    assert str(found).startswith("rank 3 (process 77) was ended by SIGKILL; the system does that where memory runs out")
    assert found.code == exit_code(found) == 137
    assert "did not start" in str(failure([], {"error": "RendezvousError: no"}, 1))
    assert "RendezvousError: no" in said(failure([], {"error": "RendezvousError: no"}, 1))


def test_how_workers_ended_is_read_from_the_desk(tmp_path: Path):
    desk.put("rank_0.json", note(0, 143, "", 1.0, ended=True), tmp_path)
    asked = trouble(tmp_path, 0)
    assert isinstance(asked, SystemExit) and asked.code == 143
    desk.put("rank_0.json", note(0, 0, "", 1.0), tmp_path)
    assert trouble(tmp_path, 0) is None
    desk.put("agent.json", {"failures": [{"rank": 1, "code": -11, "pid": 5, "time": 1.0}]}, tmp_path)
    crashed = trouble(tmp_path, 139)
    assert isinstance(crashed, WorkerFailed) and "SIGSEGV" in str(crashed) and crashed.code == 139


def test_a_failure_is_not_taken_for_the_end_that_the_others_are_asked_for(tmp_path: Path):
    """The agent ends the neighbours of a worker that failed by SIGTERM, which they obey in order."""
    desk.put("rank_0.json", note(0, 143, "", 2.0, ended=True), tmp_path)
    desk.put("rank_1.json", note(1, 1, "no luck", 1.0, kind="ValueError"), tmp_path)
    desk.put("agent.json", {"failures": [{"rank": 1, "code": 1, "pid": 5, "time": 1.0}]}, tmp_path)
    failed = trouble(tmp_path, 1)
    assert isinstance(failed, WorkerFailed) and (str(failed), failed.code) == ("rank 1: no luck", 1)
    (tmp_path / "rank_1.json").unlink()
    desk.put("agent.json", {"failures": [{"rank": 1, "code": -9, "pid": 5, "time": 1.0}]}, tmp_path)
    killed = trouble(tmp_path, 137)
    assert isinstance(killed, WorkerFailed) and "rank 1 (process 5) was ended by SIGKILL" in str(killed)
    desk.put("rank_1.json", note(1, 1, "Connection closed by peer", 3.0), tmp_path)
    desk.put("agent.json", {"failures": [{"rank": 1, "code": 1, "pid": 5, "time": 3.0}]}, tmp_path)
    lost = trouble(tmp_path, 1)
    assert isinstance(lost, SystemExit) and lost.code == 143, "a neighbour that was asked to end is no failure"
    desk.put("rank_1.json", note(1, 1, "no luck", 1.0, kind="ValueError"), tmp_path)
    desk.put(desk.TOLD, 15, tmp_path)
    told = trouble(tmp_path, 1)
    assert isinstance(told, SystemExit) and told.code == 143, "the launcher was asked first"


def test_machines_meet_in_the_order_of_their_coming_and_take_the_first_ones_word():
    place = f"127.0.0.1:{free_port()}"
    first = meeting.meet(place, 2)
    assert first.node == 0
    store = meeting.connect(place)  # as another machine does
    second = meeting.Meeting(store=store, place=place, trial=0, nodes=2, node=int(store.add("0/nodes", 1)))
    meeting.wait_for_others(first)
    first.put("task", {"config": "seed: 3"})
    assert second.node == 1
    assert second.take("task", 5) == {"config": "seed: 3"}
    assert second.take("nothing", 0.2) is None
    assert meeting.meet(place, 2).trial == 1  # the next of a sweep


def test_a_machine_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    monkeypatch.setattr(meeting, "SILENCE", 0.5)
    place = f"127.0.0.1:{free_port()}"
    first = meeting.meet(place, 2)
    stopped = threading.Event()
    first.watch(stopped.set)
    assert stopped.wait(20)
    assert first.failed == "machine 1 gave no sign of life for 0 s"
    other = meeting.Meeting(store=meeting.connect(place), place=place, trial=0, nodes=2, node=1)
    first.put("failed/0", {})
    ended = threading.Event()
    other.watch(ended.set)
    assert ended.wait(20)
    assert other.failed == "machine 0 failed"


@pytest.mark.parametrize("place", ["", "192.0.2.1", "192.0.2.1:port"])
def test_a_place_to_meet_is_host_and_port(place: str):
    with pytest.raises(ConfigError, match=r"host:port .* such as rdzv=\S+:29400"):
        meeting.address(place)
    assert meeting.address("[::1]:29400") == ("::1", 29400)
    assert meeting.is_own("127.0.0.1") and not meeting.is_own("203.0.113.7")
    assert meeting.own_address("127.0.0.1:1") == "127.0.0.1"


def test_what_was_composed_elsewhere_leaves_no_directory(tmp_path: Path):
    for name in ("alone", "full"):
        (tmp_path / name / "run" / ".hydra").mkdir(parents=True)
        (tmp_path / name / "run" / "train.log").touch()
    (tmp_path / "full" / "run" / "notes.txt").touch()
    for name in ("alone", "full"):
        meeting.discard(tmp_path / name / "run")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "full", "full/run", "full/run/notes.txt",
    ]  # fmt: skip


def test_batch_norm_over_all_devices_is_a_key_and_its_checkpoints_are_everybodys(tmp_path: Path):
    """The layers that Lightning puts in on GPUs, under the names that a run in one process has too."""
    assert (
        load_config("trainer=ddp").trainer.sync_batchnorm and not load_config("trainer=ddp_cpu").trainer.sync_batchnorm
    )
    synced = ["trainer=ddp_cpu", "trainer.sync_batchnorm=true", f"paths.root={tmp_path}", "logger=none"]
    cfg = load_config("model=unet_small", *synced)
    run = build(cfg)
    plain = [name for name, part in run.task.model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    keys = set(run.task.model.state_dict())
    model = run.trainer.strategy._layer_sync.apply(run.task.model)
    assert [name for name, part in model.named_modules() if isinstance(part, nn.SyncBatchNorm)] == plain
    assert len(plain) > 5 and set(model.state_dict()) == keys
    with pytest.raises(ConfigError, match="sync_batchnorm=true needs GPUs"):
        check_start(cfg)


def test_which_gpus_were_named_reaches_the_workers(tmp_path: Path):
    path = tmp_path / "resolved.yaml"
    for typed, kept in (('trainer.devices="2,3"', "2,3"), ("trainer.devices=[2,3]", [2, 3])):
        cfg = load_config("trainer=ddp", typed)
        wanted = plan(cfg)
        write_config(cfg, path, wanted)
        assert wanted.local == 2 and OmegaConf.load(path).trainer.devices == kept


def test_all_gpus_of_a_machine_of_slurms_are_not_counted_here():
    """Where jobs are submitted there may be none, and one process would train on one of eight."""
    with pytest.raises(ConfigError, match=r"say how many by trainer.devices or slurm.gpus_per_node"):
        local_processes(OmegaConf.create({"devices": -1, "accelerator": "gpu"}), OmegaConf.create({}))
    options = OmegaConf.create({"gpus_per_node": 8})
    assert local_processes(OmegaConf.create({"devices": -1, "accelerator": "gpu"}), options) == 8
    assert local_processes(OmegaConf.create({"devices": 4, "accelerator": "gpu"}), options) == 4
    assert local_processes(OmegaConf.create({"devices": "auto", "accelerator": "cpu"}), options) == 1
