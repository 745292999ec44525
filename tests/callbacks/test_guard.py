"""A loss or gradient that is not finite: stopped or left out, with a file that replays it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from detseg.callbacks import Guard
from detseg.callbacks.guard import _report_silent, _scaler_handles
from guarded_models import BRIGHT, DARK, fit, images, make_task, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare every weight and buffer bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def only_file(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("nonfinite_step_*.pt")
    return torch.load(path, weights_only=True)


def holds_nan(content: Any) -> bool:
    """Say whether a number that is not finite lies anywhere in plain values."""
    if isinstance(content, torch.Tensor):
        return content.is_floating_point() and not bool(content.isfinite().all())
    if isinstance(content, dict):
        return any(holds_nan(value) for value in content.values())
    if isinstance(content, list):
        return any(holds_nan(value) for value in content)
    return isinstance(content, float) and not math.isfinite(content)


class TestFinite:
    @pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.01, "by": "value"}])
    def test_a_run_with_a_guard_is_the_run_without_bit_for_bit(self, clip: dict[str, Any], tmp_path: Path):
        settings = {"gradient_clip_algorithm": clip["by"], "gradient_clip_val": 0.01} if "by" in clip else dict(clip)
        batches, trained = [images(number) for number in range(5)], []
        for guard in (None, Guard()):
            torch.manual_seed(0)
            task = make_task(dropout=0.5)
            fit(tmp_path, task, batches, guard, **settings)
            trained.append(weights(task))
        same(*trained)
        assert not list(tmp_path.glob("nonfinite*"))
        assert task.gradient_norm is not None and 0 < float(task.gradient_norm) < 100
        assert task.guard is None, "let go of when training ends"

    def test_the_norm_is_that_before_clipping_of_all_gradients(self, tmp_path: Path):
        norms = []

        class Spy(L.Callback):
            def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
                norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in task.model.parameters())))

        task = make_task()
        fit(tmp_path, task, [images(1)], Guard(), gradient_clip_val=1e-3, callbacks=[Spy()])
        assert float(task.gradient_norm) == pytest.approx(norms[0], rel=1e-5) and norms[0] > 1e-3
        assert math.sqrt(sum(float(p.grad.square().sum()) for p in task.model.parameters())) == pytest.approx(
            1e-3, 1e-3
        )


class TestStop:
    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_weights_and_statistics_stay_those_before_the_step(self, clip: float | None, tmp_path: Path):
        before, task = make_task(), make_task()
        fit(tmp_path / "before", before, [images(0), images(1)], None, gradient_clip_val=clip)
        with pytest.raises(FloatingPointError) as caught:
            fit(tmp_path, task, [images(0), images(1), images(2, DARK), images(3)], Guard(), gradient_clip_val=clip)
        same(weights(before), weights(task))
        said = str(caught.value)
        assert said.startswith("step 2: the loss is nan (loss_classification nan, loss_box nan) on images 20, 21;")
        assert f"detseg replay {tmp_path}/nonfinite_step_2.pt" in said and "lower optimizer.lr" in said

    def test_the_file_is_plain_finite_and_whole(self, tmp_path: Path):
        task = make_task(dropout=0.5)
        with pytest.raises(FloatingPointError):
            fit(tmp_path, task, [images(0), images(1, DARK)], Guard(dirpath=tmp_path / "run"))
        content = only_file(tmp_path / "run")
        assert not holds_nan(content)
        assert content["global_step"] == 1 and content["cause"]["norm"] == "nan" and content["precision"] == "32-true"
        (window,) = content["windows"]
        (entry,) = window["batches"]
        assert [target["image_id"] for target in entry["batch"]["targets"]] == [10, 11]
        assert_close(entry["batch"]["images"], images(1, DARK).images, rtol=0, atol=0)
        assert entry["terms"]["loss_classification"] == "nan" and entry["cpu"].dtype == torch.uint8
        assert_close(content["state_dict"]["model.norm.running_mean"], task.model.norm.running_mean, rtol=0, atol=0)
        assert content["detseg"]["model"]["_target_"] == "guarded_models.Moody"

    def test_a_gradient_that_is_not_finite_at_a_finite_loss(self, tmp_path: Path):
        with pytest.raises(
            FloatingPointError, match=r"step 1: the gradient is not finite \(norm nan\) at a loss of \d"
        ):
            fit(tmp_path, make_task(), [images(0), images(1, BRIGHT)], Guard())
        assert only_file(tmp_path)["cause"]["losses"].count("nan") == 0

    def test_all_batches_of_an_accumulated_step_are_in_the_file(self, tmp_path: Path):
        """The first of two is the bad one: found at the step, and named."""
        batches = [images(0), images(1), images(2, DARK), images(3)]
        with pytest.raises(FloatingPointError, match=r"step 1: .* on images 20, 21;"):
            fit(tmp_path, make_task(), batches, Guard(), accumulate_grad_batches=2)
        entries = only_file(tmp_path)["windows"][0]["batches"]
        assert [entry["batch"]["targets"][0]["image_id"] for entry in entries] == [20, 30]

    def test_a_file_that_cannot_be_written_does_not_hide_the_error(self, tmp_path: Path):
        (tmp_path / "taken").write_text("a file where the folder should be")
        with pytest.raises(FloatingPointError, match=r"the loss is nan .*\(no replay file: .*\); lower optimizer.lr"):
            fit(tmp_path, make_task(), [images(0, DARK)], Guard(dirpath=tmp_path / "taken"))


class TestSkip:
    @pytest.mark.parametrize("bad", [DARK, BRIGHT])
    @pytest.mark.parametrize(
        "optimizer",
        [
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
            partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
            partial(torch.optim.Adam, lr=0.01, fused=True),
        ],
    )
    def test_a_step_left_out_leaves_no_trace(self, optimizer: Any, bad: float, tmp_path: Path):
        """Weights, momentum, decay, statistics: all as if the batch had not been there."""
        without, skipping, guard = make_task(optimizer), make_task(optimizer), Guard(action="skip")
        fit(tmp_path, without, [images(0), images(2)], None)
        fit(tmp_path, skipping, [images(0), images(1, bad), images(2)], guard)
        same(weights(without), weights(skipping))
        assert guard.skipped == 1 and guard.file is not None and guard.file.name == "nonfinite_step_1.pt"

    def test_too_many_in_a_row_stop(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        row = [images(0, DARK), images(1, DARK), images(2), *[images(number, DARK) for number in (3, 4, 5)]]
        guard = Guard(action="skip", max_skips=2)
        with pytest.raises(FloatingPointError, match=r"step 5: .*This was step 3 in a row"):
            fit(tmp_path, make_task(), row, guard)
        assert guard.skipped == 4 and "(4 so far)" in caplog.text
        assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["nonfinite_step_0.pt", "nonfinite_step_5.pt"]

    def test_counts_go_on_in_a_resumed_run(self):
        guard, resumed = Guard(action="skip"), Guard(action="skip")
        guard.skipped, guard._in_a_row = 3, 2
        resumed.load_state_dict(guard.state_dict())
        assert (resumed.skipped, resumed._in_a_row) == (3, 2)

    @pytest.mark.parametrize(
        ("settings", "said"), [({"action": "ignore"}, "stop or skip"), ({"max_skips": 0}, "at least 1")]
    )
    def test_settings_that_make_no_sense(self, settings: dict[str, Any], said: str):
        with pytest.raises(ValueError, match=said):
            Guard(**settings)


class TestScaling:
    """With float16 the loss scaling leaves steps out by design."""

    @pytest.mark.parametrize(("scale", "handled"), [(65536.0, True), (1.0, False), (None, False)])
    def test_an_overflow_is_the_scalers_business_while_it_can_scale_down(self, scale: float | None, handled: bool):
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        assert _scaler_handles(SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))) is handled


class TestSilent:
    def test_parameters_without_gradient_are_named_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        fit(tmp_path, make_task(silent=True), [images(0), images(1)], Guard())
        told = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
        assert len(told) == 1 and told[0].startswith("2 trainable parameters") and "idle.weight, idle.bias" in told[0]

    def test_what_is_frozen_or_dropped_on_purpose_is_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        class Drop(L.Callback):
            def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
                task.model.head.weight.grad = None

        task = make_task(silent=True)
        task.model.idle.requires_grad_(False)
        fit(tmp_path, task, [images(0)], Guard(), callbacks=[Drop()])
        assert "no gradient" not in caplog.text and task.model.head.weight.grad is None

    def test_several_processes_refuse(self):
        with pytest.raises(ValueError, match=r"2 trainable parameters .*: a, b\. Several processes wait"):
            _report_silent(["a", "b"], world_size=2)
        _report_silent([], world_size=2)
