"""The learning rate finder: its reading of known curves, its rise, and that it leaves nothing changed behind."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import detseg
from detseg.cli.main import main
from detseg.config import ConfigError
from detseg.engine.finders.lr_finder import find_lr, read_curve, smooth
from detseg.tasks.schedules import Ramp, ramp

TINY = [
    "model=fcos_small",
    "trainer=cpu",
    "data.train_images=16",
    "data.val_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
]
SHORT = ["find.lr.steps=12", "find.lr.low=1e-5", "find.lr.high=1e-2", "find.lr.smooth=1.0"]


class TestCurve:
    rates = np.geomspace(1e-6, 1.0, 61).tolist()  # ten steps a decade

    def fall(self, begin: int, end: int) -> list[float]:
        """Return a loss that falls in a straight line from 3 to 1 between two steps and rises at the end."""
        steps = np.arange(61)
        fallen = np.clip((steps - begin) / (end - begin), 0, 1)
        return (3.0 - 2.0 * fallen + 4.0 * np.clip(steps - 55, 0, None)).tolist()

    def test_the_suggestion_is_the_middle_of_the_fall(self):
        curve = read_curve(self.rates, self.fall(20, 40), sigma=0)  # from 1e-4 to 1e-2
        assert curve.begins == pytest.approx(10 ** (-6 + 2.2), rel=1e-6)  # a tenth of 20 steps
        assert curve.ends == pytest.approx(10 ** (-6 + 3.9), rel=1e-6)
        assert curve.suggestion == pytest.approx(np.sqrt(curve.begins * curve.ends), rel=0.05)

    def test_smoothing_neither_shifts_nor_is_fooled_by_one_bad_step(self):
        plain = self.fall(20, 40)
        noisy = [loss + 0.3 * (-1) ** step for step, loss in enumerate(plain)]
        noisy[25] = 12.0
        found = read_curve(self.rates, noisy, sigma=3.0)
        assert found.suggestion == pytest.approx(read_curve(self.rates, plain, sigma=0).suggestion, rel=0.35)
        assert found.losses == noisy and found.rates == self.rates

    def test_smooth_keeps_a_constant_and_the_mean_of_its_neighbours(self):
        assert smooth([2.0] * 7, 3.0) == pytest.approx([2.0] * 7)
        peak = smooth([0, 0, 0, 1, 0, 0, 0], 1.0)
        assert peak.argmax() == 3 and peak[2] == pytest.approx(peak[4]) and peak[3] == pytest.approx(0.4, abs=0.01)

    def test_a_loss_that_does_not_fall_is_an_error(self):
        with pytest.raises(ValueError, match=r"does not fall between learning rates 1e-06 and 1 .*lower find.lr.low"):
            read_curve(self.rates, [1.0 + 0.01 * step for step in range(61)])
        with pytest.raises(ValueError, match=r"lost after 4 steps, at a rate of 2e-06"):
            read_curve(self.rates[:4], [1.0] * 4)


def test_the_ramp_multiplies_by_the_same_factor():
    values = [ramp(step, total_steps=5, start=1e-2, end=1e2) for step in range(6)]
    assert values == pytest.approx([1e-2, 1e-1, 1, 10, 100, 100])
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "lr": 0.5}]
    schedule = Ramp(torch.optim.SGD(groups), total_steps=5, start=1e-2, end=1e2)
    assert schedule.get_last_lr() == [0.005]


def test_nothing_of_the_callers_changes_and_nothing_is_left_but_the_curve(in_tmp: Path):
    cfg = detseg.load_config(*TINY, *SHORT, "trainer.accumulate_grad_batches=2", name="find")
    before = OmegaConf.to_yaml(cfg)
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    curve, picture = find_lr(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[1]
    files = sorted(path.name for path in in_tmp.rglob("*") if path.is_file())
    assert files == ["lr_finder.csv", "lr_finder.png"]
    rows = list(csv.reader((picture.parent / "lr_finder.csv").open()))
    assert rows[0] == ["optimizer.lr", "loss"] and len(rows) == len(curve.losses) + 1
    assert curve.rates == pytest.approx(np.geomspace(1e-5, 1e-2, 12)[: len(curve.rates)])
    assert curve.begins <= curve.suggestion <= curve.ends and cv2.imread(str(picture)).shape == (600, 960, 3)


@pytest.mark.parametrize("batches", [1, 2])
def test_the_first_losses_are_those_of_a_run(batches: int, in_tmp: Path):
    """At a rate of nearly nothing, each step's loss is that of the untrained model on the run's own batches."""
    still = ["find.lr.steps=10", "find.lr.low=1e-12", "find.lr.high=1e-11"]
    cfg = detseg.load_config(*TINY, *still, f"trainer.accumulate_grad_batches={batches}", name="find")
    with pytest.raises(ValueError, match=r"does not fall .*picture: .*lr_finder.png"):
        find_lr(cfg)
    (found,) = in_tmp.rglob("lr_finder.csv")
    losses = [float(loss) for _, loss in list(csv.reader(found.open()))[1:]]
    run = detseg.build(detseg.load_config(*TINY, "callbacks=none", "logger=none"))
    data = run.data
    data.setup("fit")
    model, each = run.task.model.train(), []
    with torch.no_grad():
        for batch in [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]:
            terms = model.loss(model(batch.images, batch.sizes, batch.targets), batch.targets)
            each.append(float(sum(terms.values())))
    expected = np.reshape(each, (-1, batches)).mean(axis=1).tolist()
    assert len(losses) == 10 and losses[: len(expected)] == pytest.approx(expected, rel=1e-4)


def test_a_rise_that_explodes_ends_early_and_says_why(in_tmp: Path):
    wild = ["find.lr.steps=40", "find.lr.high=1e6", "optimizer=sgd", "trainer.gradient_clip_val=null"]
    curve, _ = find_lr(detseg.load_config(*TINY, *wild, name="find"))
    assert len(curve.losses) < 40 and ("loss" in curve.stopped)
    assert all(np.isfinite(curve.losses)) and curve.suggestion < 10


def test_the_command_line_ends_with_a_line_to_paste(in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["find", "lr", *TINY, *SHORT, "features=[clip]"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "12 steps from 1e-05 to 0.01"
    assert lines[-1].startswith("detseg train model=fcos_small") and "find." not in lines[-1]
    assert "'features=[clip]'" in lines[-1]  # a shell takes it as it stands
    value = float(lines[-1].rpartition("optimizer.lr=")[2])
    assert detseg.load_config(*TINY, f"optimizer.lr={value}").optimizer.lr == value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["find"], "detseg find takes lr or batch"),
        (["find", "rate"], "not rate"),
        (["find", "lr", "find.lr.low=2"], "needs 0 < low < high"),
        (["find", "lr", "find.lr.step=2"], "Did you mean find.lr.steps"),
        (["find", "lr", "-m"], "not lr -m"),
    ],
)
def test_one_line_for_what_cannot_be(arguments: list[str], said: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_an_optimiser_without_a_rate_is_named(in_tmp: Path):
    cfg = detseg.load_config(*TINY, "optimizer.lr=0.0", name="find")
    with pytest.raises(ConfigError, match=r"an optimizer.lr, not low=1e-06, high=1.0, steps=100, optimizer.lr=0.0"):
        find_lr(cfg)
