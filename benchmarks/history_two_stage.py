"""The history of two-stage detectors, measured in one run: R-CNN, SPP-net, Fast R-CNN, Faster R-CNN and what followed.

    python benchmarks/history_two_stage.py                        # train and measure all on Orchard and bccd: two hours
    python benchmarks/history_two_stage.py --data bccd --systems fast_rcnn faster_rcnn
    python benchmarks/history_two_stage.py --runs runs/history/X  # trained before: only measure what is there
    python benchmarks/history_two_stage.py --scale                # VGG-16, 2,000 proposals, 600 x 800: timing only

Every system is an experiment, ``<data>_<system>`` of conf/experiment, trained by its own command. Then each of the
first ``--images`` validation images goes through it alone: "proposals" is the proposer on the photo, nothing kept on
disk, which an RPN does not have; "network" is all the rest, from pixels and proposals to detections. The first three
see the same proposals. Medians over the images. AP is that of the whole validation split; "recall" is the share of its
objects that some proposal meets at IoU 0.5, which AP50 of a system cannot exceed by much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import detseg
from detseg.config import instantiate
from detseg.ops.proposer import Proposer

REPO = Path(__file__).resolve().parents[1]
SYSTEMS = ("rcnn", "spp_net", "fast_rcnn", "faster_rcnn", "faster_rcnn_c4", "cascade_rcnn")
IN_ORDER = ("rcnn", "spp_net", "fast_rcnn", "faster_rcnn")  # the papers' order of test time, slowest first
RECALL = "proposal_recall_50_1000"
PAPER = {"fast_rcnn": 146, "fast_rcnn with SVD": 213}  # times R-CNN's speed, model L: Fast R-CNN, table 4


class Row(NamedTuple):
    """What is printed of one system."""

    system: str
    proposals: float
    network: float
    figures: dict[str, float | None]
    minutes: float | None
    parameters: float

    @property
    def total(self) -> float:
        """Seconds of an image, proposals included."""
        return self.proposals + self.network


def train(name: str, folder: Path, overrides: list[str]) -> None:
    """Train one experiment below ``folder``, unless a run that came to its end lies there; keep its minutes beside."""
    if list(folder.glob("*/*/metrics.json")):
        return
    script = shutil.which("detseg", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("the command detseg is not installed beside this Python; run make setup")
    command = [script, "train", f"experiment={name}", *overrides, f"paths.root={folder}"]
    print(f"\n== detseg {' '.join(command[1:])}\n", flush=True)
    start = time.perf_counter()
    subprocess.run(command, cwd=REPO, check=True)
    (folder / "minutes.json").write_text(json.dumps((time.perf_counter() - start) / 60))


class Timed:
    """A proposer that counts the seconds it takes."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer, self.key, self.seconds = proposer, proposer.key, 0.0

    def __call__(self, image: Tensor) -> Tensor:
        """Return what the proposer does."""
        start = time.perf_counter()
        found = self.proposer(image)
        self.seconds += time.perf_counter() - start
        return found


def measure(system: str, folder: Path, count: int) -> Row:
    """Time the trained run below ``folder`` on single photos."""
    run = sorted(folder.glob("*/*/metrics.json"))[-1].parent
    kept = run / "checkpoints"  # a run that ended before its first validation has no best
    predictor = detseg.load(next(path for path in (kept / "best.ckpt", kept / "last.ckpt") if path.is_file()))
    model: Any = predictor.model
    proposer = getattr(model, "proposer", None)  # one-stage models have none
    clock = None if proposer is None else Timed(proposer)
    if clock is not None:
        model.proposer = clock
    split = detseg.build(detseg.load_config(f"experiment={folder.name}")).data.dataset("val")
    photos = [torch.as_tensor(split[index].image) for index in range(min(count, len(split)))]
    predictor(photos[0])  # the first call warms up
    proposals, network = [], []
    for photo in photos:
        before, start = clock.seconds if clock else 0.0, time.perf_counter()
        predictor(photo)
        whole, own = time.perf_counter() - start, (clock.seconds if clock else 0.0) - before
        proposals.append(own)
        network.append(whole - own)
    minutes = folder / "minutes.json"
    return Row(
        system=system,
        proposals=statistics.median(proposals),
        network=statistics.median(network),
        figures=json.loads((run / "metrics.json").read_text()),
        minutes=json.loads(minutes.read_text()) if minutes.exists() else None,
        parameters=sum(value.numel() for value in model.parameters()) / 1e6,
    )


def table(data: str, rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    head = (
        "system",
        "proposals s",
        "network s",
        "total s",
        "AP50",
        "AP",
        "recall",
        "training min",
        "million parameters",
    )
    lines = [f"### {data}", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        figures = [row.figures.get(name) for name in ("map_50", "map", RECALL)]
        cells = [f"{row.proposals:.3f}", f"{row.network:.3f}", f"{row.total:.3f}"]
        cells += ["n/a" if value is None else f"{value:.3f}" for value in figures]
        cells += ["n/a" if row.minutes is None else f"{row.minutes:.1f}", f"{row.parameters:.2f}"]
        lines.append(f"| {row.system} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts({row.system: row for row in rows})])


def verdicts(rows: dict[str, Row]) -> list[str]:
    """Return what the papers say about the order, and whether it came out so."""
    known = [rows[name] for name in IN_ORDER if name in rows]
    seconds = [row.total for row in known]
    order = " > ".join(f"{row.system} {row.total:.3f}" for row in known)
    lines = [
        f"test time in the papers' order: {order}: {'holds' if seconds == sorted(seconds)[::-1] else 'does NOT hold'}"
    ]
    if {"rcnn", "fast_rcnn"} <= set(rows):
        ratio = rows["rcnn"].network / rows["fast_rcnn"].network
        lines.append(f"without proposals Fast R-CNN is {ratio:.0f} times as fast as R-CNN (wanted: at least 10)")
    return lines


@torch.no_grad()
def paper_scale(crops: int, proposals: int = 2000, height: int = 600, width: int = 800) -> str:
    """Time VGG-16 systems from random weights on one image, and say how their ratio compares with the paper's."""
    torch.manual_seed(0)
    image, sizes = torch.rand(1, 3, height, width), torch.tensor([[height, width]])
    corner = torch.rand(proposals, 2) * torch.tensor([width - 32.0, height - 32.0])
    side = 16 + torch.rand(proposals, 2) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat([corner, torch.minimum(corner + side, torch.tensor([width * 1.0, height * 1.0]))], dim=1)
    seconds, work = {}, {}
    model = untrained("rcnn", "model.box.head.name=vgg16")
    few, _ = timed(lambda: model.predict(model(image, sizes, proposals=[boxes[: crops // 2]]), sizes))
    many, operations = timed(lambda: model.predict(model(image, sizes, proposals=[boxes[:crops]]), sizes))
    seconds["rcnn"] = many + (many - few) / (crops - crops // 2) * (proposals - crops)
    work["rcnn"] = operations / crops * proposals
    for name, overrides in {"fast_rcnn": [], "fast_rcnn with SVD": ["compress@model.box.compress=svd"]}.items():
        model = untrained("fast_rcnn", *overrides)
        run = partial(lambda net: net.predict(net(image, sizes, proposals=[boxes]), sizes), model)
        run()  # makes the thin layers
        seconds[name], work[name] = timed(run)
    lines = [
        f"### VGG-16, {proposals} proposals, one image of {height} x {width}, {torch.get_num_threads()} threads",
        "",
        "| system | network s | 10^12 operations | R-CNN's time / this | R-CNN's operations / this | paper's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, value in seconds.items():
        ratios = f"{seconds['rcnn'] / value:.0f}x | {work['rcnn'] / work[name]:.0f}x"
        paper = f"{PAPER[name]}x" if name in PAPER else ""
        lines.append(f"| {name} | {value:.2f} | {work[name] / 1e12:.2f} | {ratios} | {paper} |")
    rates = ", ".join(f"{name} {work[name] / value / 1e9:.0f}" for name, value in seconds.items())
    relative = work["rcnn"] / work["fast_rcnn"] / PAPER["fast_rcnn"]
    lines += [
        "",
        f"R-CNN was timed with {crops // 2} and {crops} crops; each further one costs the same, so more are reckoned.",
        f"A ratio of times is one of operations over one of rates. Rates here, 10^9 operations a second: {rates}.",
        f"On the paper's K40 R-CNN must have run at {relative:.2f} of Fast R-CNN's rate, if the operations are ours.",
    ]
    return "\n".join(lines)


def untrained(name: str, *overrides: str) -> Any:
    """Return a model of the paper's size from random weights, for 20 classes."""
    cfg = detseg.load_config(f"model={name}", *overrides)
    cfg.data.num_classes = 20
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return instantiate(without_weights(section), path="model").eval()


def without_weights(node: Any) -> Any:
    """Weights named by a string would be downloaded; lists of that name are box coders'."""
    if not isinstance(node, dict):
        return node
    strings = {key for key, value in node.items() if key == "weights" and isinstance(value, str)}
    return {key: None if key in strings else without_weights(value) for key, value in node.items()}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, and the multiplications and additions of its layers in a second call."""
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        run()
    return seconds, float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["orchard", "bccd"], choices=["orchard", "bccd"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--images", type=int, default=20, help="validation images that are timed, one by one")
    parser.add_argument("--runs", type=Path, help="folder of an earlier call; what is trained there is only measured")
    parser.add_argument("--scale", action="store_true", help="only the timing at the papers' scale")
    parser.add_argument("--crops", type=int, default=64, help="crops that R-CNN is timed with at that scale")
    parser.add_argument("overrides", nargs="*", help="key=value for every training, such as seed=2")
    options = parser.parse_args()
    if options.scale:
        print(paper_scale(options.crops))
        return
    folder = (options.runs or REPO / "runs" / "history" / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for data in options.data:
        for system in options.systems:
            train(f"{data}_{system}", folder / f"{data}_{system}", options.overrides)
        rows = [measure(system, folder / f"{data}_{system}", options.images) for system in options.systems]
        parts.append(table(data, rows))
        (folder / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join([*parts, paper_scale(options.crops)]))


if __name__ == "__main__":
    main()
