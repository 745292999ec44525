"""Dense detectors beside their peers, as Markdown tables: training, inference, assignment, and the order of the papers.

    python benchmarks/dense.py --peer-python PEER/bin/python --runs runs/learning/X   # all, about 15 minutes on 2 cores
    python benchmarks/dense.py --parts step infer                                     # some
    python benchmarks/dense.py --parts order --runs runs/learning/X

``step``: a training step beside torchvision's model with the same weights on the same batch (``train_step.py``).
``infer``: one image beside torchvision's model with the same weights, and what channels last and bfloat16 gain.
``assign``: targets beside torchvision's (``assignment.py``) and Ultralytics'. ``yolo``: training the present-day YOLO n
beside Ultralytics' own trainer on the same files. ``order``: accuracy against speed of trained runs. What lacks its
peer is left out with a line that says so. Contenders take turns; ratios are medians of those of each round. Tables are
printed as they come, so that an interrupted run keeps what it had. "channels last" is ``features=channels_last``, a
layout of memory, which each side is measured with and without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from assignment import compare as compare_assignment
from assignment import draw as draw_boxes
from side_by_side import alignment, inference, papers, peer, yolo_training
from side_by_side.turns import markdown, paired_ratio
from side_by_side.twins import DENSE, SIDES
from train_step import draw, measure

LAYOUTS = (torch.contiguous_format, torch.channels_last)
BATCHES = {"ssdlite": 8, "ssd300": 4, "retinanet": 2, "fcos": 2}  # images that fit a few seconds a step
HEIGHT, WIDTH = 480, 640  # of the models that take any size
YOLO_TURNS = 3  # trainings of each side; all of a turn take three to four minutes


def step(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of training steps, row by row."""
    yield "## Training step (wanted: 1.2x)\n"
    yield _head(
        "model",
        "batch",
        "torchvision images/s",
        "detseg",
        "torchvision, channels last",
        "detseg, channels last",
        "detseg, channels last, bf16-mixed",
        "plain / plain",
        "channels last / plain",
        "channels last / their better",
        "bf16-mixed / plain float32",
        "loss apart",
    )
    for name in options.models:
        height, width, batch = SIDES.get(name, HEIGHT), SIDES.get(name, WIDTH), BATCHES[name]
        data = draw(batch=batch, objects=10, height=height, width=width)
        timing = measure(name, data, options.rounds, "cpu", LAYOUTS, half=True)
        theirs, ours, their_last, our_last, half = timing.seconds
        better = min((theirs, their_last), key=statistics.median)
        pairs = (theirs, ours), (theirs, our_last), (better, our_last), (theirs, half)
        ratios = [f"{paired_ratio(*pair):.2f}x" for pair in pairs]
        rates = [f"{rate:.2f}" for rate in timing.rates(batch)]
        yield _row(name, f"{batch} of {height} x {width}", *rates, *ratios, f"{timing.apart:.0e}")


def infer(options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of inference, row by row."""
    yield "## Inference, images/s, one image at a time (wanted: 1.2x)\n"
    yield _head(*inference.PAIR_HEAD)
    for name in options.models:
        yield _row(*inference.compare(name, options.rounds).cells())
    yield "\n## What channels last and bfloat16 gain over plain float32: the network alone, one image\n"
    yield _head(*inference.GAIN_HEAD)
    for name in inference.dense_models():
        yield _row(*inference.gains(name, min(options.rounds, 3)))


def assign(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of target assignment: 16 images of 640 pixels with 100 objects each."""
    yield "## Assignment at 640 pixels, 16 images, 100 objects each (wanted: 20x)\n"
    yield _head("assigner, peer", "references", "positives", "detseg ms", "peer ms", "ratio", "equal")
    boxes = draw_boxes(16, 100, 640, 300.0)
    for name in ("FCOS", "RetinaNet"):
        row = compare_assignment(name, boxes, 640, options.rounds)
        times = [f"{row.own * 1e3:.2f}", f"{row.their * 1e3:.1f}", f"{row.their / row.own:.0f}x"]
        cells = [str(row.references), str(row.positives), *times, "yes" if row.equal else "NO"]
        yield _row(f"{name}, torchvision", *cells)
    if options.peer_python is None:
        yield "\n" + peer.skipped("assign")
        return
    lattice = alignment.lattice_of(640)
    yield _row(
        *alignment.row(
            "drawn", alignment.drawn(16, 100, 640, 300.0, lattice), lattice, options.rounds, options.peer_python
        )
    )
    yield _row(*alignment.row("apart", alignment.apart(16, 640, lattice), lattice, options.rounds, options.peer_python))


def yolo(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of YOLO training: theirs and ours in turns."""
    yield "## Training YOLO n with validation after each epoch (wanted: 1.0x)\n"
    if options.peer_python is None:
        yield peer.skipped("yolo")
        return
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yolo_training.write_orchard(folder / "data")
        for turn in range(YOLO_TURNS):
            given = options.epochs, options.mosaic
            ends, version = yolo_training.theirs(
                folder / "data", folder / f"theirs_{turn}", *given, options.peer_python
            )
            rates.setdefault(f"Ultralytics {version}, yolo11n", []).append(yolo_training.rate(ends))
            for number, choices in enumerate(yolo_training.CHOICES):
                label = " ".join(["detseg, model=yolo (n)", *choices])
                ends = yolo_training.ours(folder / "data", folder / f"ours_{number}_{turn}", *given, *choices)
                rates.setdefault(label, []).append(yolo_training.rate(ends))
    yield _head("trainer", "images/s", "ratio", "of single turns")
    theirs = next(iter(rates.values()))
    for label, own in rates.items():
        turns = sorted(our / their for our, their in zip(own, theirs, strict=True))
        span = f"{turns[0]:.2f}x to {turns[-1]:.2f}x"
        yield _row(label, f"{statistics.median(own):.2f}", f"{statistics.median(turns):.2f}x", span)
    numbers = f"{yolo_training.TRAIN} + {yolo_training.VAL} images of {yolo_training.PIXELS} pixels"
    yield f"\n{numbers}, batch {yolo_training.BATCH}, mosaic {'on' if options.mosaic else 'off'} in both, AdamW, EMA."


def order(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table of accuracy against speed."""
    yield f"## The order of the papers ({options.data})\n"
    if options.runs is None:
        yield "order: skipped, no runs given. python benchmarks/learning.py 'orchard_*' trains them; then --runs FOLDER"
        return
    yield papers.table(options.runs.resolve(), options.data, options.images)


def _head(*cells: str) -> str:
    return markdown(cells, [])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


PARTS = {"step": step, "infer": infer, "assign": assign, "yolo": yolo, "order": order}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(DENSE), choices=DENSE, help="of step and infer")
    parser.add_argument("--rounds", type=int, default=5, help="that count, of step, infer and assign")
    parser.add_argument("--peer-python", type=Path, help="a Python that has Ultralytics, for assign and yolo")
    parser.add_argument("--epochs", type=int, default=3, help="of yolo; the first does not count")
    parser.add_argument(
        "--mosaic", action=argparse.BooleanOptionalAction, default=True, help="in both trainers of yolo"
    )
    parser.add_argument("--runs", type=Path, help="folder with <experiment>/*/*/metrics.json, for order")
    parser.add_argument("--data", default="orchard", help="first word of order's experiments")
    parser.add_argument("--images", type=int, default=20, help="validation images that order times, one by one")
    options = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.rounds} rounds", flush=True
    )
    failed = False
    for name in options.parts:
        print(flush=True)
        try:
            for line in PARTS[name](options):
                print(line, flush=True)
        except RuntimeError as error:  # of a peer: the other parts go on
            print(f"\n{name}: {error}", flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
