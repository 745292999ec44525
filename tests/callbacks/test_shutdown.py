"""Runs that are told to end, and runs that are killed: what they leave, what they return, and how they go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import killed_runs
from detseg.callbacks import Shutdown
from detseg.callbacks.signals import HANDLED, Signals, code_of, listening, requeue
from forks import run_forked
from shared import REPO
from tiny_task import TinyTask, fit


def run_trials(directory: Path, *trials: dict[str, Any]) -> list[int]:
    """Run trials one after the other in forks of this process; return their exit codes."""
    if not torch.cuda.is_available():
        return [code for trial in trials for code in killed_runs.run(trial)]
    plan = directory / "plan.json"
    plan.write_text(json.dumps(trials))
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "killed_runs.py"), str(plan)],
        env=os.environ | {"PYTHONPATH": str(REPO / "tests")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    logs = "\n".join(path.read_text()[-2000:] for path in directory.rglob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads(done.stdout.splitlines()[-1])


def trace(directory: Path, name: str) -> list[str]:
    return (directory / name).read_text().splitlines()


def steps(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("step")]


def joined(first: list[str], rest: list[str]) -> list[str]:
    """Return the steps of a run that was broken off, with what was trained twice counted once; both must agree."""
    number = {line.split()[1]: line for line in steps(first)}
    for line in steps(rest):
        assert number.get(line.split()[1], line) == line, "a step that was done again came out otherwise"
        number[line.split()[1]] = line
    return [number[key] for key in sorted(number, key=int)]


SAVE = {"checkpoint": {"last_every_n_steps": 2}}


@pytest.mark.slow
class TestToldToEnd:
    def test_a_checkpoint_within_the_step_and_the_exit_code(self, tmp_path: Path):
        trials = [
            {"directory": str(tmp_path / name), "name": "first", "signal": number, "after": after, **more}
            for name, number, after, more in (
                ("term", signal.SIGTERM, 3, {}),
                ("usr1", signal.SIGUSR1, 3, {}),
                ("int", signal.SIGINT, 3, {}),
                ("validation", signal.SIGTERM, 5, {"slow": 0.2}),
                ("group", signal.SIGTERM, 3, {"group": True, "options": {"data": {"num_workers": 2}}}),
            )
        ]
        whole = {"directory": str(tmp_path / "whole"), "name": "first"}
        again = [{"directory": trial["directory"], "name": "second", "resume": True} for trial in trials]
        codes = run_trials(tmp_path, whole, *trials, *again)
        assert codes == [0, 143, 143, 130, 143, 143, 0, 0, 0, 0, 0]
        expected = trace(tmp_path / "whole", "first")
        for trial in trials:
            directory = Path(trial["directory"])
            first, rest = trace(directory, "first"), trace(directory, "second")
            assert first + rest == expected, f"{directory.name}: nothing is lost and nothing is done twice"
        assert not any(line.startswith("val") for line in trace(tmp_path / "validation", "first"))
        saved = torch.load(tmp_path / "term" / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] >= 10  # the resumed run's own
        assert "told to end by SIGTERM: step" in (tmp_path / "term" / "first.0.log").read_text()

    def test_a_second_interrupt_ends_at_once(self, tmp_path: Path):
        trial = {"directory": str(tmp_path / "run"), "name": "first", "signal": signal.SIGINT, "after": 5, "times": 2}
        (code,) = run_trials(tmp_path, trial | {"stuck": 30})  # or the first might have ended it before the second came
        assert code == 130
        assert not list((tmp_path / "run").rglob("*.ckpt"))
        assert "Ctrl-C again ends it at once" in (tmp_path / "run" / "first.0.log").read_text()

    def test_the_step_of_several_batches_is_finished(self, tmp_path: Path):
        options = {"accumulate_grad_batches": 4, "data": {"train": 40}, "max_epochs": 1}
        trial = {"directory": str(tmp_path / "run"), "name": "first", "signal": signal.SIGTERM, "after": 6}
        codes = run_trials(tmp_path, trial | {"options": options})
        assert codes == [143]
        batches = len(steps(trace(tmp_path / "run", "first")))
        saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert batches % 4 == 0 and saved["global_step"] == batches // 4
        assert saved["detseg_position"]["batch"] == batches and not saved["detseg_position"]["accumulating"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times_and_gone_on_with_each_time(workers: int, tmp_path: Path):
    """kill -9 at random moments; the checkpoints are of every second step, so up to two steps are done again."""
    options = {"data": {"num_workers": workers, "train": 16}, "max_epochs": 4, **SAVE}
    other = {**options, "data": {"num_workers": 2 - workers, "train": 16}}
    draw = random.Random(workers)
    whole = {"directory": str(tmp_path / "whole"), "name": "first", "options": options}
    killed, again = [], []
    for number in range(10):
        place = {"directory": str(tmp_path / f"run{number}")}
        after = draw.randrange(1, 34)
        killed.append(place | {"name": "first", "signal": signal.SIGKILL, "after": after, "options": options})
        again.append(place | {"name": "second", "resume": True, "options": other if number % 3 == 0 else options})
    codes = run_trials(tmp_path, whole, *killed, *again)
    assert codes[0] == 0 and codes[11:] == [0] * 10
    assert codes[1:11].count(-signal.SIGKILL) >= 8, "the others came to their end before the signal"
    expected = steps(trace(tmp_path / "whole", "first"))
    assert len(expected) == 32
    for number in range(10):
        first, rest = (trace(tmp_path / f"run{number}", name) for name in ("first", "second"))
        assert joined(first, rest) == expected, f"trial {number}"
        last = [line for line in rest if not line.startswith("step")][-2:]
        assert last == trace(tmp_path / "whole", "first")[-2:], "validation and epoch end as in the unbroken run"
        assert len(steps(first)) + len(steps(rest)) <= 32 + 2


@pytest.mark.slow
class TestSeveralProcesses:
    TWO: ClassVar[dict[str, Any]] = {"strategy": "ddp", "devices": 2, "data": {"train": 20}}

    def test_a_signal_to_one_ends_all_at_the_same_step(self, tmp_path: Path):
        common = {"ranks": 2, "options": self.TWO}
        whole = {"directory": str(tmp_path / "whole"), "name": "first", **common}
        told = [
            {"directory": str(tmp_path / "step"), "name": "first", "signal": signal.SIGTERM, "after": 3, "to": 1},
            {"directory": str(tmp_path / "val"), "name": "first", "signal": signal.SIGTERM, "after": 5, "slow": 0.3},
        ]
        again = [{"directory": trial["directory"], "name": "second", "resume": True, **common} for trial in told]
        codes = run_trials(tmp_path, whole, *(trial | common for trial in told), *again)
        assert codes == [0, 0, 143, 143, 143, 143, 0, 0, 0, 0]
        for trial in told:
            for rank in ("", ".1"):
                first, rest = (trace(Path(trial["directory"]), f"{name}{rank}") for name in ("first", "second"))
                assert first + rest == trace(tmp_path / "whole", f"first{rank}")
        assert len(steps(trace(tmp_path / "step", "first"))) in (4, 5), "the step under way and the one of asking"

    def test_one_that_waits_for_a_stopped_neighbour_ends_after_its_grace(self, tmp_path: Path):
        trial = {"directory": str(tmp_path / "run"), "name": "first", "signal": signal.SIGTERM, "after": 3, "stop": 1}
        codes = run_trials(tmp_path, trial | {"ranks": 2, "options": self.TWO, "grace": 1})
        assert codes == [143, -signal.SIGKILL]
        said = (tmp_path / "run" / "first.0.log").read_text()
        assert "ended by SIGTERM without a checkpoint: nothing moved for 1 s" in said


@pytest.mark.slow
def test_the_command_returns_the_code_and_goes_on_with_what_it_left(tmp_path: Path):
    small = ["trainer=cpu", "model=unet_small", "data.image_size=64", "data.train_images=8", "data.val_images=2"]
    quick = ["data.batch_size=2", "data.num_workers=0", "callbacks.images=null", "trainer.log_every_n_steps=1"]
    command = [
        sys.executable,
        "-m",
        "detseg.cli.main",
        "train",
        *small,
        *quick,
        "resume=auto",
        "trainer.max_epochs=500",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(60) == 143, said
    finally:
        process.kill()
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"told to end by SIGTERM: step {step}" in said and step >= 8
    assert not (last.parent.parent / "metrics.json").exists()
    done = run_forked(["train", f"resume={last.parent.parent}", f"trainer.max_epochs={step // 4 + 1}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 4 * (step // 4 + 1)


class TestSlurm:
    def test_usr1_has_the_job_queued_again_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        calls = tmp_path / "calls"
        fake = tmp_path / "scontrol"
        fake.write_text(f"#!/bin/sh\necho $@ >> {calls}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        codes = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with pytest.raises(SystemExit) as end, listening():
                for _ in range(2):  # the second comes while the first is being obeyed
                    os.kill(os.getpid(), number)
            codes.append(end.value.code)
        assert codes == [0, 143]
        assert calls.read_text() == "requeue 4711\n", "SIGTERM is the end that somebody asked for"
        monkeypatch.setenv("RANK", "1")
        assert requeue() and calls.read_text() == "requeue 4711\n", "the first process does it for all"
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        assert requeue() and calls.read_text().splitlines()[1:] == ["requeue 12_3"]

    def test_without_slurm_or_where_it_refuses_the_code_is_that_of_the_signal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert not requeue() and code_of(signal.SIGUSR1) == 143 and code_of(signal.SIGINT) == 130
        monkeypatch.setenv("SLURM_JOB_ID", "1; rm -rf x")
        assert not requeue()
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not requeue(), "no scontrol"


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in HANDLED]
    with listening() as outer, listening() as inner:
        assert outer is inner and signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(ValueError, match="grace must be positive, got 0"):
        Shutdown(grace=0)


def test_figures_of_a_split_have_more_time_than_a_batch(tmp_path: Path):
    """Counting those of a large split takes longer than the grace, which is for a neighbour that is dead."""
    seen: list[tuple[str, bool]] = []

    class Task(TinyTask):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(("batch", Signals.active._saving))

        def on_validation_epoch_end(self) -> None:
            seen.append(("figures", Signals.active._saving))

    fit(Task(), tmp_path, Shutdown(), epochs=2)
    assert set(seen) == {("batch", False), ("figures", True)} and seen[-1] == ("figures", True)
    assert [name for name, _ in seen].count("figures") == 2 and Signals.active is None
