"""What ``task.channels_last=true`` makes of a training step, for every experiment on Orchard, as a Markdown table.

    python benchmarks/layout.py                          # all of them, some minutes
    python benchmarks/layout.py orchard_fcos --rounds 9

A step is forward, losses, backward and SGD on the experiment's own first batch, without loading it. Both layouts take
steps in turns; the first does not count, medians are shown. Weights and batch are the same on both sides.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from side_by_side.turns import markdown, seconds_in_turns
from train_step import Learner, Terms

import detseg
from detseg.engine.errors import quiet
from detseg.tasks.proposals import given_proposals

EXPERIMENTS = Path(__file__).parents[1] / "conf" / "experiment"


def learner(experiment: str, *, channels_last: bool) -> Learner:
    """Return what takes a training step of an experiment in one of the layouts."""
    few = ["data.train_images=32", "data.val_images=4", "data.num_workers=0"]
    run = detseg.build(
        detseg.load_config(
            *[f"experiment={experiment}", "paths=notebook", "trainer=cpu", "logger=csv", *few],
            f"task.channels_last={str(channels_last).lower()}",
        )
    )
    task, data = run.task, run.data
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)

    def losses(model: Any) -> Terms:
        images = batch.images.contiguous(memory_format=task.layout)  # (B, 3, H, W)
        return model.loss(model(images, batch.sizes, batch.targets, **given_proposals(batch)), batch.targets)

    return Learner(task.model, losses, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in EXPERIMENTS.glob("orchard_*.yaml"))
    parser.add_argument("experiments", nargs="*", default=known, help="names in conf/experiment; default: orchard_*")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet()
    rows = []
    for name in options.experiments:
        layouts = [learner(name, channels_last=last) for last in (False, True)]
        plain, last = map(statistics.median, seconds_in_turns(layouts, options.rounds))
        rows.append([name, f"{plain * 1e3:.0f}", f"{last * 1e3:.0f}", f"{plain / last:.2f}x"])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(markdown(["experiment", "ms a step", "channels last", "gain"], rows))


if __name__ == "__main__":
    main()
