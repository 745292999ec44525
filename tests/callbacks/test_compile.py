"""A compiled run against a plain one, and runs in which compiling fails at each place where it can."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from detseg.callbacks import EMA, Compile
from detseg.callbacks.compile import WithFallback
from tiny_task import TinyTask, fit


class DropoutTask(TinyTask):
    """The tiny task with a backbone and dropout, which draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.model.head = nn.Linear(4, 2)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(self.model(batch[0]))


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def train(directory: Path, *callbacks: L.Callback, **settings: Any) -> tuple[DropoutTask, list[float], L.Trainer]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    task, losses = DropoutTask(), Losses()
    trainer = fit(task, directory, *callbacks, losses, **settings)
    return task, losses.values, trainer


def counting(calls: list[int]) -> Callable[..., Any]:
    """Return a backend that runs what it is given as it is and counts how often it is asked."""

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    return backend


def broken(graph: Any, inputs: Any) -> Any:
    torch.rand(3)  # an attempt may draw random numbers before it fails
    raise RuntimeError("this backend\nknows nothing")


def test_trains_as_without_and_with_the_same_keys(tmp_path: Path):
    calls: list[int] = []
    plain, expected, _ = train(tmp_path)
    task, losses, trainer = train(tmp_path, Compile(backend=counting(calls)))  # type: ignore[arg-type]
    assert losses == expected and len(losses) == 12 and len(calls) == 1  # one compilation, of the backbone
    assert set(task.state_dict()) == set(plain.state_dict())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "model.backbone.0.weight" in saved and not [name for name in saved if "_orig_mod" in name]
    assert task.model.backbone._compiled_call_impl is None  # left as it was


def test_evaluation_is_not_compiled(tmp_path: Path):
    calls: list[int] = []
    task, _, _ = train(tmp_path, Compile(backend=counting(calls)), epochs=1)  # type: ignore[arg-type]
    assert len(task.seen) == 6 and len(calls) == 1
    assert_close(task.seen[-1], task.eval()._modules["model"](task._loader().dataset.tensors[0][20:24]))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_compiling_fails_the_run_is_the_plain_one_with_one_warning(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    if where == "backward" and not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        pytest.skip("this torch compiles the backward pass where nothing can be mended")
    backend = broken if where == "forward" else aot_autograd(fw_compiler=lambda g, _: g, bw_compiler=broken)
    expected = train(tmp_path)[1]
    with caplog.at_level(logging.WARNING, logger="detseg"):
        losses = train(tmp_path, Compile(backend=backend))[1]  # type: ignore[arg-type]
    assert losses == expected  # random numbers too
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("detseg")]
    assert "torch.compile failed on backbone" in said and "this backend" in said and "\n" not in said


def test_an_error_of_the_models_own_is_not_compilings(caplog: pytest.LogCaptureFixture):
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"got {len(x)} rows")

    module = Wrong()
    call = WithFallback(module, torch.compile(module._call_impl, backend="eager"), "wrong")
    with pytest.raises(ValueError, match="got 2 rows"):
        call(torch.zeros(2))
    assert not call.failed and "torch.compile failed" not in caplog.text


def test_out_of_memory_is_not_compilings():
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    call = WithFallback(nn.Identity(), full, "identity")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        call(torch.zeros(2))
    assert not call.failed


def test_a_later_failure_ends_compiling_too(caplog: pytest.LogCaptureFixture):
    """Such as at the second image size."""
    calls: list[int] = []

    def second_fails(graph: Any, inputs: Any) -> Any:
        if calls:
            raise RuntimeError("no room for two")
        return counting(calls)(graph, inputs)

    torch._dynamo.reset()
    module = nn.Linear(3, 2)
    call = WithFallback(module, torch.compile(module._call_impl, backend=second_fails, dynamic=False), "head")
    for rows in (4, 5, 4):
        assert_close(call(torch.ones(rows, 3)), module(torch.ones(rows, 3)))
    assert len(calls) == 1 and call.failed and caplog.text.count("torch.compile failed on head") == 1


def test_parts_are_named(tmp_path: Path):
    calls: list[int] = []
    train(tmp_path, Compile(parts=["backbone", "head"], backend=counting(calls)), epochs=1)  # type: ignore[arg-type]
    assert len(calls) == 2
    with pytest.raises(AttributeError, match="neck"):
        train(tmp_path, Compile(parts=["neck"], backend="eager"))


def test_averaged_weights_and_accumulation_go_with_it(tmp_path: Path):
    """The average moves once per optimiser step, of which six batches have three, and is that of the plain run."""
    plain = EMA(decay=0.8, warmup=5)
    expected = train(tmp_path, plain, accumulate_grad_batches=2)[0].state_dict()
    average = EMA(decay=0.8, warmup=5)
    task = train(tmp_path, average, Compile(backend="eager"), accumulate_grad_batches=2)[0]
    assert int(average._average_model.n_averaged) == int(plain._average_model.n_averaged) == 6
    assert average._average_model.module.model.backbone._compiled_call_impl is None  # the copy is not compiled
    for name, value in task.state_dict().items():
        assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_agrees_within_rounding(in_tmp: Path):
    import detseg

    losses = []
    for features in ("[]", "[compile]"):
        tiny = ["data.train_images=8", "data.val_images=1", "data.batch_size=2", "data.image_size=64"]
        cfg = detseg.load_config(
            "model=fcos_small", *tiny, "data.num_workers=0", "trainer=cpu", "trainer.max_epochs=1", "callbacks=none",
            "logger=none", f"features={features}",
        )  # fmt: skip
        run, seen = detseg.build(cfg), Losses()
        run.trainer.callbacks.append(seen)
        run.trainer.fit(run.task, run.data)
        compiled = [part for part in run.trainer.callbacks if isinstance(part, Compile)]
        assert len(compiled) == (features == "[compile]")
        losses.append(seen.values)
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
