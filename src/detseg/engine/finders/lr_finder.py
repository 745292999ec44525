"""A learning rate from a short run in which it rises until the loss does.

The range test of Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (arXiv:1506.01186, section 3.3),
with the rate rising by the same factor in every step, as in fastai. What differs: the curve is smoothed by a bell over
the steps on both sides instead of a running mean, which lags behind and so names a rate that is too high. And the
suggestion is the middle, in the logarithm, of the fall: models with norms in every layer may never diverge, so the
usual "a tenth of the lowest rate" has no point to go by. On Orchard with AdamW it says 0.0006 for FCOS and 0.0038
for U-Net, where the configs have 0.002 and 0.004: a safe start, from which to try upwards (16 epochs of FCOS reach AP50
0.79 with the suggestion and 0.89 with the config's).
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError, build
from detseg.engine.finders.batch_trial import first_device

Array = NDArray[np.float64]

KEPT = ("freeze", "compile")
"""Callbacks that change what is trained; the others only watch."""


@dataclass(frozen=True)
class Curve:
    """What the rise showed; rates are values of ``optimizer.lr``, whatever a rule makes of them.

    Attributes:
        rates: of each step.
        losses: of each step, its batches' mean.
        smoothed: the losses, smoothed.
        begins: the rate at which a tenth of the smoothed loss's fall is done.
        ends: the rate at which nineteen twentieths are done; beyond it nothing is won.
        stopped: why the rise ended before its last step; empty where it did not.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    begins: float
    ends: float
    stopped: str = ""

    @property
    def suggestion(self) -> float:
        """The rate half way, in the logarithm, between ``begins`` and ``ends``, to two digits."""
        return float(f"{math.sqrt(self.begins * self.ends):.1e}")


def smooth(values: Sequence[float] | Array, sigma: float) -> Array:
    """Return ``values`` smoothed by a bell of standard deviation ``sigma`` steps, renormalised at both ends."""
    numbers = np.asarray(values, dtype=np.float64)
    if sigma <= 0:
        return numbers
    steps = np.arange(len(numbers))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None]) / sigma) ** 2)  # (N, N)
    return cast(Array, weights @ numbers / weights.sum(axis=1))


def tamed(losses: Sequence[float]) -> Array:
    """Return the median of each loss and its four neighbours, cut where it exceeds the first ones by half.

    No single bad batch moves a median, and an explosion at the end would reach far into the fall.
    """
    numbers = np.asarray(losses, dtype=np.float64)
    if not len(numbers):
        return numbers
    five = np.lib.stride_tricks.sliding_window_view(np.pad(numbers, 2, mode="edge"), 5)
    return np.minimum(np.median(five, axis=1), 1.5 * np.median(numbers[:10]))


def read_curve(rates: Sequence[float], losses: Sequence[float], *, sigma: float = 3.0, stopped: str = "") -> Curve:
    """Find where the fall of the smoothed loss, from its start to its lowest point, begins and ends.

    Args:
        rates: rising by a constant factor.
        losses: one per rate, finite.
        sigma: see ``smooth``.
        stopped: handed on.

    Raises:
        ValueError: there are fewer than 10 steps, or the loss falls by no more than it varies from step to step.
    """
    if len(losses) < 10:
        last = rates[len(losses) - 1] if losses else 0.0
        raise ValueError(f"the loss was lost after {len(losses)} steps, at a rate of {last:.3g}; lower find.lr.low")
    curve = smooth(tamed(losses), sigma)
    bottom = int(curve.argmin())
    fall = curve[0] - curve[bottom]
    if fall <= max(float(np.std(tamed(losses)[: bottom + 1] - curve[: bottom + 1])), 1e-12):
        raise ValueError(
            f"the loss does not fall between learning rates {rates[0]:.3g} and {rates[-1]:.3g} "
            f"({curve[0]:.4g} to {curve[-1]:.4g}); look at the picture, lower find.lr.low or raise find.lr.steps"
        )
    begins, ends = (float(rates[int((curve <= curve[0] - share * fall).argmax())]) for share in (0.1, 0.95))
    return Curve(list(rates), list(losses), curve.tolist(), begins, ends, stopped)


def find_lr(cfg: DictConfig) -> tuple[Curve, Path]:
    """Let the learning rate rise over a few steps of what ``cfg`` trains; return the curve and its picture.

    A model, data and a trainer are built for this alone: neither ``cfg`` nor any object, checkpoint or random number
    of the caller's changes. One process, the config's own precision, accumulation, clipping, frozen parts and weights
    to start from; no validation, no averages.

    Args:
        cfg: from ``load_config(..., name="find")``; ``lr_finder.png`` and ``lr_finder.csv`` go to its run directory.

    Raises:
        ConfigError: the optimiser names no ``lr``, or a number of ``find.lr`` is out of range.
        ValueError: the loss does not fall anywhere; the picture is there all the same.
    """
    settings = cfg.find.lr
    peak = cfg.optimizer.get("lr")
    if not peak or not 0 < settings.low < settings.high or settings.steps < 10:
        raise ConfigError(
            f"find.lr: needs 0 < low < high, at least 10 steps and an optimizer.lr, not low={settings.low}, "
            f"high={settings.high}, steps={settings.steps}, optimizer.lr={peak}"
        )
    watch = Rise(stop=settings.stop)
    with untouched():
        run = build(_rising(cfg, float(peak)))
        run.trainer.callbacks.append(watch)  # type: ignore[attr-defined]  # a list; Lightning types it away
        try:
            run.trainer.fit(run.task, datamodule=run.data)
        except FloatingPointError as error:  # the task's own check of its loss
            watch.stopped = watch.stopped or str(error).partition(";")[0]
    rates = np.geomspace(settings.low, settings.high, settings.steps)[: len(watch.losses)].tolist()
    return _written(rates, watch, Path(cfg.paths.output_dir), settings.smooth)


def _rising(cfg: DictConfig, peak: float) -> DictConfig:
    """Return a copy of the config that trains with a rising rate and leaves nothing behind."""
    copy = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    settings = copy.find.lr
    ends = {"start": settings.low / peak, "end": settings.high / peak}
    copy.scheduler = {"_target_": "detseg.tasks.schedules.Ramp", "_partial_": True, **ends}
    callbacks = copy.get("callbacks") or {}
    copy.callbacks = {name: callbacks[name] for name in KEPT if callbacks.get(name) is not None}
    copy.logger = copy.resume = None
    copy.trainer.update(max_steps=settings.steps, max_epochs=-1, max_time=None, min_epochs=None)
    copy.trainer.update(limit_val_batches=0, num_sanity_val_steps=0, fast_dev_run=False)
    copy.trainer.update(enable_checkpointing=False, enable_progress_bar=False)
    copy.trainer.update(devices=first_device(copy.trainer.devices), num_nodes=1, strategy="auto")
    return copy


class Rise(L.Callback):
    """Collects the loss of every optimiser step and ends the run when it has risen too far.

    Args:
        stop: end where the running mean of the loss is this many times its lowest.
    """

    def __init__(self, *, stop: float) -> None:
        self.stop, self.stopped = stop, ""
        self.losses: list[float] = []
        self._batches: list[float] = []
        self._mean, self._lowest = 0.0, math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's loss, once all of its batches are through."""
        self._batches.append(float(outputs["loss"]))
        if trainer.global_step <= len(self.losses):
            return
        loss = float(np.mean(self._batches)) * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._batches = []
        if not math.isfinite(loss):
            self.stopped, trainer.should_stop = f"the loss became {loss}", True
            return
        self.losses.append(loss)
        self._mean = 0.8 * self._mean + 0.2 * loss
        mean = self._mean / (1 - 0.8 ** len(self.losses))
        self._lowest = min(self._lowest, mean)
        if len(self.losses) >= 10 and mean > self.stop * self._lowest:
            self.stopped, trainer.should_stop = f"the loss rose to {mean / self._lowest:.1f} times its lowest", True


@contextmanager
def untouched() -> Iterator[None]:
    """Put the random numbers of python, numpy and torch back afterwards."""
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _written(rates: list[float], watch: Rise, directory: Path, sigma: float) -> tuple[Curve, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lr_finder.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("optimizer.lr", "loss"), *zip(rates, watch.losses, strict=True)])
    picture = directory / "lr_finder.png"
    try:
        curve = read_curve(rates, watch.losses, sigma=sigma, stopped=watch.stopped)
    except ValueError as error:
        draw(rates, watch.losses, smooth(tamed(watch.losses), sigma), picture)
        raise ValueError(f"{error}; picture: {picture}") from error
    draw(rates, watch.losses, curve.smoothed, picture, curve)
    return curve, picture


def draw(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float] | Array,
    path: Path,
    curve: Curve | None = None,
) -> Path:
    """Draw loss over learning rate, with the suggestion and the lowest point marked; return the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="0.7", markersize=4, label="each step")
    axes.plot(rates, smoothed, color="tab:blue", label="smoothed")
    if curve is not None:
        for rate, colour, meaning in (
            (curve.begins, "tab:orange", "the fall begins"),
            (curve.suggestion, "tab:green", "suggestion, half way"),
            (curve.ends, "tab:red", "the fall ends"),
        ):
            height = np.interp(math.log(rate), np.log(curve.rates), curve.smoothed)
            axes.axvline(rate, color=colour, linewidth=1, linestyle="--")
            axes.plot([rate], [height], "o", color=colour, label=f"{rate:.2g}: {meaning}")
    axes.set(xscale="log", xlabel="optimizer.lr", ylabel="training loss", title="Learning rate finder")
    if len(smoothed):
        axes.set_ylim(*_span(losses, np.asarray(smoothed)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _span(losses: Sequence[float], smoothed: Array) -> tuple[float, float]:
    """Return limits that show the fall: the explosion at the end would press it flat."""
    low, start = min(*losses, float(smoothed.min())), float(smoothed[0])
    top = max(start, float(np.median(losses))) + 0.5 * (start - low)
    return low - 0.05 * (top - low), max(top, low + 1e-6)
