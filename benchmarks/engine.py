"""What the engine costs around a model: a step, a checkpoint, a resumed start, a trial of a sweep.

    python benchmarks/engine.py                          # all four, some minutes
    python benchmarks/engine.py step checkpoint          # these alone

``step``: a detector of one parameter and ten scalars, trained by hand (forward, loss, backward, SGD) and by the trainer
with the default callbacks and loggers, so that the difference is the engine's; wanted: at most 1 ms at any interval of
logging. Beside it the same ten scalars through Lightning's ``self.log_dict``. ``guard``: the share of a real step
that the guard against NaN takes, wanted below 1 %. ``checkpoint``: seconds to write and to read a sealed checkpoint
against its size, beside ``torch.save`` to the same disk. ``resume``: seconds of a command that begins a short run, and
of one that goes on with it. ``sweep``: seconds of a trial beyond its training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import detseg
from detseg.config import build_trainer
from detseg.durable import check_seal, write_sealed
from detseg.structures import Batch, Detections, Target
from detseg.tasks import AnchorFreeDetection

SCALARS = 10
STEPS = 2000
SIZES = (1, 10, 100, 400)  # MB
LONE = (
    "trainer=cpu",
    "logger=none",
    "trainer.max_epochs=1",
    "trainer.limit_val_batches=0",
    "trainer.enable_checkpointing=false",
    "callbacks.checkpoint=null",
)
TINY = ("data.image_size=64", "data.train_images=16", "data.val_images=4", "data.batch_size=4", "data.num_workers=0")


class OneParameter(nn.Module):
    """A detector whose step costs next to nothing, with nine loss terms: their sum makes the tenth scalar."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Any = None) -> Tensor:
        """Return one number."""
        return self.weight * images.sum()

    def loss(self, outputs: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Return nine terms."""
        return {f"term_{number}": outputs * number for number in range(SCALARS - 1)}

    def predict(self, outputs: Tensor, sizes: Tensor) -> list[Detections]:
        """Find nothing."""
        return [Detections.empty() for _ in sizes]


class Repeated(L.LightningDataModule):
    """The same small batch, as often as asked for."""

    class_names, num_classes, category_ids = ("apple", "pear", "orange"), 3, (0, 1, 2)

    def __init__(self, steps: int) -> None:
        super().__init__()
        target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), size=(8, 8))
        sizes = torch.tensor([[8, 8]])
        batches = [Batch(images=torch.ones(1, 3, 8, 8), sizes=sizes, targets=[target])] * steps
        self.loader: DataLoader[Batch] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list will do

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader."""
        return self.loader


class LoggedByLightning(AnchorFreeDetection):
    """The same task as users write it: ten scalars through ``self.log_dict`` in every step."""

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the sum of the terms."""
        terms = self.model.loss(self.model(batch.images, batch.sizes), batch.targets)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({"train/loss": loss} | {f"train/{name}": value for name, value in terms.items()})
        return loss


class Clock(L.Callback):
    """Seconds of every step from the second on, as the trainer goes through them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the clock."""
        self.ends.append(time.perf_counter())

    @property
    def mean(self) -> float:
        """Seconds of a step; the first ten warm up."""
        return (self.ends[-1] - self.ends[9]) / (len(self.ends) - 10)


@contextlib.contextmanager
def quiet() -> Iterable[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def by_hand() -> float:
    """Return the seconds of a step without any engine."""
    model, loader = OneParameter(), Repeated(STEPS).loader
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for number, batch in enumerate(loader):
        if number == 10:
            start = time.perf_counter()
        loss = torch.stack(list(model.loss(model(batch.images, batch.sizes), batch.targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / (STEPS - 10)


def by_trainer(directory: Path, interval: int, loggers: str, kind: type[AnchorFreeDetection]) -> float:
    """Return the seconds of a step of the trainer as ``detseg train`` builds it."""
    cfg = detseg.load_config(
        f"logger={loggers}", "trainer=cpu", "trainer.max_epochs=1", f"trainer.log_every_n_steps={interval}"
    )
    cfg.paths.output_dir = str(directory / f"{kind.__name__}_{loggers.strip('[]')}_{interval}")
    cfg.trainer.limit_val_batches = 0
    task = kind(
        model=OneParameter(),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        class_names=Repeated.class_names,
        monitor="val/map",
    )
    trainer, clock = build_trainer(cfg), Clock()
    trainer.callbacks.append(clock)
    with quiet():
        trainer.fit(task, datamodule=Repeated(STEPS))
    return clock.mean


def step(directory: Path) -> None:
    """Print what the engine adds to a step."""
    bare = min(by_hand() for _ in range(3))
    print(f"step by hand {bare * 1e3:.3f} ms; {SCALARS} scalars; what the engine adds, in ms (wanted: at most 1)\n")
    print("| loggers              | interval | detseg | self.log_dict |")
    print("|----------------------|---------:|-------:|--------------:|")
    for loggers in ("csv", "[csv,tensorboard]", "many"):
        for interval in (1, 10, 50):
            kinds = (AnchorFreeDetection, LoggedByLightning)
            ours, theirs = (by_trainer(directory, interval, loggers, kind) - bare for kind in kinds)
            print(f"| {loggers:<20} | {interval:>8} | {ours * 1e3:>6.3f} | {theirs * 1e3:>13.3f} |", flush=True)


def guard(directory: Path) -> None:
    """Print the share of a small FCOS's step that the guard takes, from alternating runs."""
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(5):
        for name, override in (("with", []), ("without", ["callbacks.guard=null"])):
            cfg = detseg.load_config(*LONE, "data.train_images=640", "data.num_workers=0", *override)
            cfg.paths.output_dir = str(directory / f"guard_{name}_{number}")
            run, clock = detseg.build(cfg), Clock()
            run.trainer.callbacks.append(clock)
            with quiet():
                run.trainer.fit(run.task, run.data)
            times[name].append(clock.mean)
    with_guard, without = (statistics.median(times[name]) for name in ("with", "without"))
    print(
        f"step of fcos_small, 16 images: {with_guard * 1e3:.1f} ms with the guard, {without * 1e3:.1f} without: "
        f"{with_guard / without - 1:+.1%} (five runs each in turn, medians; wanted: below 1 %)"
    )


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def checkpoint(directory: Path) -> None:
    """Print the seconds of writing and reading against the size."""
    print("| MB of weights | write, sealed | torch.save | read, checked | torch.load | check alone |")
    print("|--------------:|--------------:|-----------:|--------------:|-----------:|------------:|")
    from detseg.checkpoint import read_checkpoint

    def plain_save(content: Any, path: Path) -> None:
        with path.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())

    for size in SIZES:
        content = {"state_dict": {f"layer{n}": torch.randn(size, 250, 100) for n in range(10)}}
        ours, theirs = directory / f"sealed_{size}.ckpt", directory / f"plain_{size}.ckpt"
        columns = [
            seconds(partial(write_sealed, content, ours)),
            seconds(partial(plain_save, content, theirs)),
            seconds(partial(read_checkpoint, ours)),
            seconds(partial(torch.load, theirs, weights_only=True)),
            seconds(partial(check_seal, ours)),
        ]
        print(f"| {size:>13} | " + " | ".join(f"{value:>11.3f}" for value in columns) + " |", flush=True)


def command(*arguments: str, folder: Path) -> float:
    """Run ``detseg`` and return its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "detseg.cli.main", *arguments], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"detseg {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def resume(directory: Path) -> None:
    """Print whole commands: begin and train one epoch; go on from it and train one more."""
    short = ("train", "name=resume", "trainer=cpu", "callbacks.images=null", "evaluate_after=false", *TINY)
    begin = command(*short, "trainer.max_epochs=1", folder=directory)
    (run,) = (directory / "runs" / "resume").iterdir()
    again = command("train", f"resume={run}", "trainer.max_epochs=2", folder=directory)
    print(f"one short epoch: {begin:.1f} s as a new command, {again:.1f} s as resume=<run>, start of Python included")


def sweep(directory: Path) -> None:
    """Print the seconds of a trial beyond its training: in one process (-m), and in processes of their own (tune)."""
    short = ("name=sweep", "trainer=cpu", "trainer.max_epochs=1", "callbacks.images=null", *TINY)
    one = command("train", *short, "seed=1", folder=directory)
    many = command("train", "-m", *short, "seed=1,2,3,4,5", folder=directory)
    print(f"one command {one:.1f} s; five trials of -m {many:.1f} s: {(many - one) / 4:.2f} s for each further one")
    space = ("optimizer.lr=interval(1e-4,1e-3)", "tune.trials=5", "tune.workers=1")
    tuned = command("tune", *short, *space, folder=directory)
    print(
        f"five trials of detseg tune {tuned:.1f} s: {(tuned - one) / 4:.2f} s for each further one, in its own process"
    )


PARTS: dict[str, Callable[[Path], None]] = {part.__name__: part for part in (step, guard, checkpoint, resume, sweep)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    chosen = parser.parse_args().parts or list(PARTS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ["WANDB_SILENT"] = "true"  # its summaries would drown the tables
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    directory = Path(tempfile.mkdtemp(prefix="engine-", dir=os.environ.get("BENCH_DIR")))
    try:
        for name in chosen:
            print(f"\n## {name}\n")
            PARTS[name](directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
