"""Two processes, of which one has an image that spoils its loss: both decide alike, and the file is that one's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from detseg.callbacks import Guard
from detseg.engine.processes.launch import failure
from guarded_models import BRIGHT, DARK, fit, images, make_task, weights
from ranks import run_ranks


def train(rank: int, folder: str, bad: float, action: str) -> dict[str, Any]:
    """Train three steps on this rank's own batches; the second of rank 1 is bad. Return what was seen."""
    task, guard = make_task(), Guard(action=action)
    batches = [images(3 * rank + step, bad if (rank, step) == (1, 1) else 0.5) for step in range(3)]
    said = ""
    try:
        fit(Path(folder), task, batches, guard, strategy="ddp", devices=2, use_distributed_sampler=False)
    except FloatingPointError as error:
        said = str(error)
    return {"said": said, "weights": weights(task), "skipped": guard.skipped, "step": task.global_step}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [DARK, BRIGHT])
def test_both_stop_and_say_the_same(bad: float, tmp_path: Path):
    found = run_ranks(train, 2, tmp_path / "ranks", str(tmp_path), bad, "stop")
    assert found[0]["said"] == found[1]["said"] != ""
    content = torch.load(tmp_path / "nonfinite_step_1.pt", weights_only=True)
    guilty = [1] if bad == DARK else [0, 1]  # a gradient is known after the reduction alone, so all are kept
    assert [window["rank"] for window in content["windows"]] == guilty
    assert content["windows"][-1]["batches"][0]["batch"]["targets"][0]["image_id"] == 40
    if bad == DARK:
        assert "(loss_classification nan, loss_box nan) on rank 1 on images 40, 41;" in found[0]["said"]
    for name, value in found[0]["weights"].items():
        assert bool(value.isfinite().all()), name
        if "running" not in name:  # each rank's own statistics
            assert_close(value, found[1]["weights"][name], rtol=0, atol=0)


def test_the_launcher_says_the_guards_error_and_not_how_the_other_ranks_were_ended():
    note = {"rank": 0, "code": 1, "kind": "FloatingPointError", "message": "step 1: the loss is nan", "time": 5.0}
    note |= {"trace": ""}
    ended = {"rank": 1, "code": -signal.SIGTERM, "pid": 7, "time": 4.9}
    said = failure([note | {"ended": False}], {"failures": [ended]}, 1)
    assert str(said) == "rank 0: step 1: the loss is nan" and said.code == 1 and said.kind == "FloatingPointError"
    assert "rank 1 (process 7) was ended by SIGTERM" in str(failure([], {"failures": [ended]}, 1))


@pytest.mark.slow
def test_both_leave_the_step_out(tmp_path: Path):
    found = run_ranks(train, 2, tmp_path / "ranks", str(tmp_path), DARK, "skip")
    assert [one["skipped"] for one in found] == [1, 1] and [one["step"] for one in found] == [3, 3]
    assert_close(found[0]["weights"]["head.weight"], found[1]["weights"]["head.weight"], rtol=0, atol=0)
    assert bool(found[0]["weights"]["head.weight"].isfinite().all())
    assert len(list(tmp_path.glob("nonfinite*.pt"))) == 1
