"""Every file of conf/features: composes alone and with the others, and does, in numbers, what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import detseg
from detseg.config import ConfigError
from detseg.engine.half import HalfWeights
from shared import REPO

FEATURES = sorted(path.stem for path in (REPO / "conf" / "features").glob("*.yaml"))
TINY = [
    "model=fcos_small",
    "trainer=cpu",
    "data.train_images=8",
    "data.val_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "logger=none",
    "callbacks=none",
]


class Watch(L.Callback):
    """Keeps each step's loss, and after each optimiser step the gradient's norm, the rates and the body's weight."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[list[float]] = []
        self.body: list[torch.Tensor] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [value.grad for value in pl_module.model.parameters() if value.grad is not None]
        if grads:  # as clipped: of the step that has just been
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.body.append(next(pl_module.model.parameters()).detach().clone())  # of a backbone the stem


def train(features: str, *overrides: str) -> tuple[Any, Watch]:
    run, watch = detseg.build(detseg.load_config(*TINY, f"features={features}", *overrides)), Watch()
    run.trainer.callbacks.append(watch)
    run.trainer.fit(run.task, run.data)
    return run, watch


class TestComposing:
    def test_all_go_together(self):
        chosen = [name for name in FEATURES if name != "fp16"]
        cfg = detseg.load_config(f"features=[{','.join(chosen)}]")
        assert {"freeze", "compile", "ema", "early_stopping"} <= set(cfg.callbacks)
        assert {"checkpoint", "stamp"} <= set(cfg.callbacks)  # what every run has stays
        assert cfg.trainer.precision == "bf16-mixed" and cfg.trainer.deterministic is True
        assert cfg.trainer.accumulate_grad_batches == 4 and cfg.trainer.gradient_clip_val == 1.0
        assert cfg.task.layer_decay == 0.75 and cfg.task.channels_last is True
        assert cfg.scheduler._target_.endswith("WarmupCosine") and len(chosen) == 11

    def test_none_is_the_default_and_what_is_typed_wins(self):
        plain, empty = detseg.load_config(), detseg.load_config("features=[]")
        assert OmegaConf.to_container(plain.callbacks) == OmegaConf.to_container(empty.callbacks)
        typed = ["features=[clip,ema,freeze]", "trainer.gradient_clip_val=3", "callbacks.ema.decay=0.5"]
        cfg = detseg.load_config(*typed, "callbacks.freeze.until_epoch=7")
        assert (cfg.trainer.gradient_clip_val, cfg.callbacks.ema.decay, cfg.callbacks.freeze.until_epoch) == (3, 0.5, 7)

    def test_an_unknown_one_gets_the_nearest_names(self):
        with pytest.raises(
            ConfigError, match=r"there is no features=freez. Did you mean freeze\?.* Choices: accumulate"
        ):
            detseg.load_config("features=[bf16,freez]")
        with pytest.raises(
            ConfigError, match=r"^there is no key 'callbacks.freeze.until'. Did you mean callbacks.freeze"
        ):
            detseg.load_config("features=[freeze,ema]", "callbacks.freeze.until=3")

    def test_a_feature_comes_after_an_experiment(self):
        cfg = detseg.load_config("experiment=orchard_fcos", "features=[warmup,clip]")
        assert cfg.name == "orchard_fcos" and cfg.scheduler._target_.endswith("WarmupCosine")
        assert cfg.trainer.gradient_clip_val == 1.0


class TestEffects:
    def test_clip(self, in_tmp: Path):
        loose = train("[]", "trainer.gradient_clip_val=null")[1]
        tight = train("[clip]")[1]
        assert max(loose.norms) > 1.5 and max(tight.norms) <= 1 + 1e-4 and len(tight.norms) >= 6

    def test_accumulate_is_the_gradient_of_the_larger_batch(self, in_tmp: Path):
        """Without batch norm's statistics four batches of two are one of eight; here: as many steps as that."""
        run, watch = train("[accumulate]")
        assert run.trainer.global_step == 2 and len(watch.losses) == 8  # two epochs of four batches
        moved = [not torch.equal(a, b) for a, b in zip(watch.body, watch.body[1:], strict=False)]
        assert moved == [False, False, True, False, False, False, True]

    def test_freeze(self, in_tmp: Path):
        _, watch = train("[freeze]")
        still = [torch.equal(a, b) for a, b in zip(watch.body, watch.body[1:], strict=False)]
        assert still == [True, True, True, False, False, False, False]

    def test_layer_rates(self, in_tmp: Path):
        run, watch = train("[layer_rates]", "scheduler=constant")
        names = [group["name"] for group in run.trainer.optimizers[0].param_groups]
        rates = dict(zip(names, watch.rates[0], strict=True))
        assert rates["rest"] == pytest.approx(2e-3) and len(names) == 10
        for number in range(4):  # stem and three stages of one block
            assert rates[f"body_{number:02d}"] == pytest.approx(2e-3 * 0.75 ** (4 - number))

    def test_warmup(self, in_tmp: Path):
        _, watch = train("[warmup]", "scheduler.warmup_steps=4")
        rates = [row[0] for row in watch.rates]  # after each step: of the next one
        assert rates[:4] == pytest.approx([2e-3 * (0.001 + 0.999 * step / 4) for step in range(1, 5)])
        assert rates[3] == max(rates) and rates[-1] < 1e-3

    def test_channels_last_and_deterministic_change_rounding_alone(self, in_tmp: Path):
        plain = train("[]")[1].losses
        run, watch = train("[channels_last,deterministic]")
        assert watch.losses == pytest.approx(plain, rel=1e-3)
        assert run.task.model.backbone.body.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.are_deterministic_algorithms_enabled()

    def test_ema_validates_the_average(self, in_tmp: Path):
        run, watch = train("[ema]")
        own = next(run.task.model.backbone.parameters())
        average = watch.body[0]
        for step, value in enumerate(watch.body[1:], start=1):
            average = torch.lerp(average, value, 1 - min(0.999, (1 + step) / (10 + step)))
        assert_close(own.detach(), average)
        assert (own - watch.body[-1]).abs().max() > 1e-5  # training ended elsewhere

    def test_early_stopping(self, in_tmp: Path):
        quick = ["trainer.max_epochs=9", "callbacks.early_stopping.patience=1", "trainer.limit_train_batches=1"]
        run, _ = train("[early_stopping]", *quick, "callbacks.early_stopping.min_delta=2.0")  # more than AP can win
        assert run.trainer.current_epoch < 9 and run.trainer.should_stop

    def test_compile_falls_back(self, in_tmp: Path, caplog: pytest.LogCaptureFixture):
        def refuse(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("knows nothing")

        torch._dynamo.register_backend(compiler_fn=refuse, name="knows_nothing")
        plain = train("[]")[1].losses
        assert train("[compile]", "callbacks.compile.backend=knows_nothing")[1].losses == plain
        assert caplog.text.count("torch.compile failed on backbone") == 1


class TestPrecision:
    @pytest.mark.parametrize("features", ["bf16", "fp16"])
    def test_mixed_keeps_weights_in_32_bits(self, features: str, in_tmp: Path):
        """A CPU has no float16 mixture; Lightning takes bfloat16 there."""
        plain = train("[]")[1].losses
        run, watch = train(f"[{features}]")
        assert watch.losses != plain and watch.losses == pytest.approx(plain, rel=0.1)
        assert {value.dtype for value in run.task.parameters()} == {torch.float32}

    @pytest.mark.slow
    @pytest.mark.parametrize("model", ["fcos_small", "faster_rcnn_small", "mask_rcnn_small", "unet_small"])
    def test_weights_in_16_bits_train_with_an_average_in_32(self, model: str, in_tmp: Path):
        run, watch = train("[ema]", "trainer.precision=bf16-true", f"model={model}")
        weights = list(run.task.model.parameters())
        assert {value.dtype for value in weights if value.ndim > 1} == {torch.bfloat16}
        assert {value.dtype for value in weights if value.ndim <= 1} == {torch.float32}
        average = run.trainer.callbacks[0]._average_model.module
        assert {value.dtype for value in average.parameters()} == {torch.float32}
        assert all(math.isfinite(loss) for loss in watch.losses) and math.isfinite(run.task.results["val"]["loss"])
        assert run.cfg.trainer.precision == "bf16-true"  # as typed, for the files of the run

    def test_the_losses_are_those_of_rounded_weights(self, in_tmp: Path):
        plain, rounded = train("[]")[1].losses, train("[]", "trainer.precision=bf16-true")[1].losses
        assert rounded != plain and rounded[0] == pytest.approx(plain[0], rel=0.02)

    def test_boxes_and_buffers_stay_as_they_are(self):
        plugin, module = (
            HalfWeights(device="cpu"),
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)),
        )
        plugin.convert_module(module)
        kinds = {name: value.dtype for name, value in module.state_dict().items()}
        assert kinds["0.weight"] == torch.bfloat16 and kinds["0.bias"] == kinds["1.running_mean"] == torch.float32
        boxes = torch.tensor([[1.0, 2.0, 513.25, 700.5]])
        assert torch.equal(plugin.convert_input({"boxes": boxes})["boxes"], boxes)
        with plugin.forward_context():
            assert torch.arange(3.0).dtype == torch.float32
            assert module[0](torch.ones(1, 3, 2, 2)).dtype == torch.bfloat16

    def test_float16_weights_are_refused(self, in_tmp: Path):
        with pytest.raises(ConfigError, match="16-true loses small gradients; choose bf16-true"):
            detseg.build(detseg.load_config(*TINY, "trainer.precision=16-true"))


@pytest.mark.slow
def test_two_processes_freeze_average_and_accumulate(in_tmp: Path):
    """The body is bitwise as it was built, norms' statistics too, the head is not, and the guard has no complaint."""
    tiny = [text for text in TINY if not text.startswith(("trainer=", "callbacks=", "trainer.max_epochs"))]
    features = "features=[freeze,ema,accumulate]"
    quick = ["trainer=ddp_cpu", "trainer.max_epochs=1", "callbacks.images=null", "evaluate_after=false"]
    command = [sys.executable, "-m", "detseg.cli.main", "train", *tiny, *quick, features]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=in_tmp)
    assert done.returncode == 0, done.stderr[-2000:]
    (last,) = in_tmp.rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 1  # 8 images: two batches of two for each process, together one step
    built = detseg.build(detseg.load_config(*TINY)).task.model.state_dict()
    same = {name: torch.equal(value, saved["current_model_state"][f"model.{name}"]) for name, value in built.items()}
    body = [equal for name, equal in same.items() if name.startswith("backbone.body.")]
    assert len(body) > 20 and all(body) and not any(equal for name, equal in same.items() if "head" in name)
    assert "no gradient" not in done.stdout + done.stderr
