"""Sharing a machine out, and processes that end in every way."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import stub_study
from detseg.config import ConfigError, load_config
from detseg.engine.sweeps.pool import LOG, Order, Pool, Slot, slots, visible_gpus
from detseg.engine.sweeps.record import RECORD, TrialRecord
from detseg.engine.sweeps.study import plain


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture
def pool() -> Iterator[Pool]:
    built = Pool(slots=slots(1))
    yield built
    built.close()


def order(directory: Path, objective=stub_study.objective, **changes) -> Order:
    cfg = load_config("trainer=cpu", "optimizer.lr=0.001", f"paths.output_dir={directory}")
    record = TrialRecord(parameters={"optimizer.lr": "0.001"}, seed=1, monitor="val/map", mode="max", number=0)
    return Order(config=plain(cfg) | changes, directory=directory, record=record, objective=objective)


def until_ended(pool: Pool, seconds: float = 120.0) -> list[tuple[Order, TrialRecord]]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if ended := pool.ended(0.5):
            return ended
    raise AssertionError("no trial ended")


def test_gpus_are_shared_in_groups(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [slot.gpus for slot in slots(None, gpus=["0", "1", "2"])] == [("0",), ("1",), ("2",)]
    assert [slot.gpus for slot in slots(None, gpus="01234", per_trial=2)] == [("0", "1"), ("2", "3")]
    assert slots(2, gpus=["GPU-a", "GPU-b"]) == [Slot(("GPU-a",), (0, 1, 2, 3)), Slot(("GPU-b",), (4, 5, 6, 7))]
    with pytest.raises(ConfigError, match=r"tune\.workers=3: there is room for 1 to 2 \(2 GPUs, tune\.gpus=1\)"):
        slots(3, gpus=["0", "1"])
    with pytest.raises(ConfigError, match=r"tune\.gpus=4: there are 2 GPUs"):
        slots(None, gpus=["0", "1"], per_trial=4)


def test_cores_are_shared_evenly_and_each_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7, 9}, raising=False)
    assert slots(None) == [Slot((), (1, 3, 5, 7, 9))]
    assert [slot.cores for slot in slots(2)] == [(1, 3), (5, 7, 9)]
    with pytest.raises(ConfigError, match="there are 5 processor cores"):
        slots(6)
    with pytest.raises(ConfigError, match=r"tune\.workers=0"):
        slots(0)


def test_visible_gpus_are_those_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-77")
    assert visible_gpus() == ["3", "GPU-77"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert visible_gpus() == []


@pytest.mark.slow
def test_a_trial_has_its_slot_to_itself_and_leaves_a_record(tmp_path: Path):
    core = sorted(os.sched_getaffinity(0))[-1]
    pool = Pool(slots=[Slot(gpus=("5", "6"), cores=(core,))])
    try:
        pool.start(order(tmp_path / "a", objective=stub_study.surroundings))
        assert (pool.free, pool.busy) == (0, 1)
        ((back, record),) = until_ended(pool)
    finally:
        pool.close()
    text = (tmp_path / "a" / LOG).read_text()
    assert "GPUs 5,6 threads 1" in text and f"cores [{core}] torch 1 leader True" in text
    assert record.state == "complete" and record.value == core and record.seconds > 0
    assert TrialRecord.read(back.directory) == record and pool.free == 1
    assert str(core) not in os.environ.get("CUDA_VISIBLE_DEVICES", ""), "this process keeps its own"


@pytest.mark.slow
def test_trials_that_die_leave_the_pool_as_it_was(tmp_path: Path, pool: Pool):
    pool.start(order(tmp_path / "a", optimizer={"lr": -1.0}))
    ((_, record),) = until_ended(pool)
    assert record.state == "failed" and record.error and record.value is None
    assert "Traceback" in (tmp_path / "a" / LOG).read_text()
    pool.start(order(tmp_path / "b"))
    pool.signal(signal.SIGKILL)
    ((_, record),) = until_ended(pool)
    assert record.state == "running" and "killed by SIGKILL" in str(record.error)
    assert not (tmp_path / "b" / RECORD).exists(), "what was killed from outside can be gone on with"
    pool.start(order(tmp_path / "c"))
    ((_, record),) = until_ended(pool)
    assert record.value == 1.0, "the pool goes on"
    pool.start(order(tmp_path / "d"))
    pool.close()
    assert pool.busy == 0


@pytest.mark.slow
def test_a_fork_server_that_runs_already_will_do(tmp_path: Path):
    multiprocessing.forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    first = context.Process(target=int)
    first.start()
    first.join()
    pool = Pool(slots=slots(1))
    try:
        pool.start(order(tmp_path / "a"))
        ((_, record),) = until_ended(pool)
    finally:
        pool.close()
        multiprocessing.forkserver._forkserver._stop()
    assert record.value == 1.0


def test_records_survive_their_file_and_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = TrialRecord(parameters={"a": "1"}, seed=3, monitor="val/map", mode="max")
    assert record.finished({"map": 0.5}, seconds=2.0).value == 0.5
    missing = record.finished({"map": float("nan"), "loss": 1.0, "ap/cat": 0.1}, seconds=2.0)
    assert missing.state == "failed" and missing.error == "val/map has no value; figures of the run: loss, map"
    monkeypatch.setenv("SOME_TOKEN", "xyzzy-12345")
    failed = record.failed("no entry\n with xyzzy-12345", seconds=1.0)
    assert failed.error == "no entry with <SOME_TOKEN>"
    from detseg.engine.sweeps.record import write_record

    write_record(tmp_path / RECORD, failed)
    assert TrialRecord.read(tmp_path) == failed and TrialRecord.read(tmp_path / "nothing") is None
