"""Non-maximum suppression: ours beside torchvision's greedy NMS and a plain loop of torch operations, in one run.

    python benchmarks/nms.py                       # 1,000 and 5,000 boxes
    python benchmarks/nms.py --boxes 20000 --rounds 1

Two kinds of scenes of 1333 x 800 pixels: boxes all over the image, and heaps around objects as a detector gives them.
The loop is Soft-NMS as one would write it in torch: take the best of a class, lower the others, leave out what fell
below the score threshold. All get the same float32 tensors in host memory; rounds alternate, the median is shown.
"equal" says whether the loop, in float64 as ours counts, keeps the same boxes in the same order, and how far the scores
are apart at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detseg.ops.adaptive_nms import DensityAdaptiveNMS, SizeAdaptiveNMS
from detseg.ops.nms import BatchedNMS
from detseg.ops.soft_nms import SoftNMS

Scene = tuple[Tensor, Tensor, Tensor]
"""Boxes ``(N, 4)``, scores ``(N,)``, labels ``(N,)``."""
SIZE = torch.tensor([1333.0, 800.0])


def soft_loop(boxes: Tensor, scores: Tensor, labels: Tensor, *, method: str) -> tuple[Tensor, Tensor]:
    """Soft-NMS with sigma 0.5, N_t 0.3 and score threshold 0.001, class by class, box by box."""
    rows, lowered = [], []
    for label in labels.unique():
        row = ((labels == label) & (scores >= 0.001)).nonzero()[:, 0]
        box, score = boxes[row], scores[row]
        while len(row):
            top = int(score.argmax())
            rows.append(row[top])
            lowered.append(score[top])
            iou = box_iou(box[top : top + 1], box)[0]
            score = score * (torch.exp(-(iou**2) / 0.5) if method == "gaussian" else torch.where(iou < 0.3, 1, 1 - iou))
            left = score >= 0.001
            left[top] = False
            row, box, score = row[left], box[left], score[left]
    if not rows:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    order = torch.stack(lowered).argsort(descending=True, stable=True)
    return torch.stack(rows)[order], torch.stack(lowered)[order]


def apart(count: int, classes: int, generator: torch.Generator) -> Scene:
    """Draw boxes of 16 to 256 pixels all over the image."""
    centre = torch.rand(count, 2, generator=generator) * SIZE
    side = 16 * 16 ** torch.rand(count, 2, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return torch.cat([centre - side / 2, centre + side / 2], dim=1), torch.rand(count, generator=generator), labels


def heaps(count: int, classes: int, generator: torch.Generator) -> Scene:
    """Draw about 80 boxes around every object, which score the more the better they fit."""
    number = max(1, count // 80)
    truth, _, labels = apart(number, classes, generator)
    owner = torch.arange(count) % number
    side = (truth[:, 2:] - truth[:, :2])[owner]
    centre = (truth[:, 2:] + truth[:, :2])[owner] / 2 + torch.randn(count, 2, generator=generator) * 0.15 * side
    side = side * (torch.randn(count, 2, generator=generator) * 0.2).exp()
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    fit = torch.cat([box_iou(box[None], truth[own][None])[0] for box, own in zip(boxes, owner, strict=True)])
    return boxes, fit * (0.5 + 0.5 * torch.rand(count, generator=generator)), labels[owner]


def median_ms(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Time the calls in turns, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in taken]


def soft_row(name: str, scene: Scene, rounds: int) -> list[str]:
    lines = []
    for method in ("linear", "gaussian"):
        ours = SoftNMS(method=method)
        keep, scores = ours(*scene)
        theirs, lowered = soft_loop(scene[0].double(), scene[1].double(), scene[2], method=method)
        equal = len(keep) == len(theirs) and bool((keep == theirs).all())
        apart_by = f"yes, {float((scores - lowered).abs().max()):.0e}" if equal else "NO"
        loop, own = median_ms([partial(soft_loop, *scene, method=method), partial(ours, *scene)], rounds)
        lines.append(f"{name}  {method:<9} {len(keep):>6} {loop:>10.1f} {own:>10.1f} {loop / own:>7.1f}x  {apart_by}")
    return lines


def greedy_row(name: str, scene: Scene, rounds: int) -> str:
    kinds = [BatchedNMS(threshold=0.5), SizeAdaptiveNMS(threshold=0.5), DensityAdaptiveNMS(threshold=0.5)]
    calls: list[Callable[[], object]] = [partial(batched_nms, *scene, 0.5), *(partial(kind, *scene) for kind in kinds)]
    kept = "  ".join(f"{len(kind(*scene)[0]):>6}" for kind in kinds)
    times = median_ms(calls, rounds)
    return f"{name}  {kept}" + "".join(f" {one:>12.1f}" for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    scenes = {
        f"{draw.__name__:<6} {count:>6} {classes:>8}": draw(count, classes, generator)
        for draw in (apart, heaps)
        for count in options.boxes
        for classes in (1, 20)
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.rounds} rounds\n")
    print("Soft-NMS: a loop of torch operations and ours, ms")
    print(
        f"{'scene':<6} {'boxes':>6} {'classes':>8}  {'':<9} {'kept':>6} {'loop':>10} {'detseg':>10} {'ratio':>8}  equal"
    )
    for name, scene in scenes.items():
        print("\n".join(soft_row(name, scene, options.rounds)), flush=True)
    print("\nGreedy at IoU 0.5: torchvision's and ours, ours by size, ours by density: boxes kept, ms")
    print(f"{'scene':<6} {'boxes':>6} {'classes':>8}  {'greedy':>6}  {'size':>6}  {'dens.':>6}", end="")
    print(f" {'torchvision':>12} {'greedy':>12} {'size':>12} {'density':>12}")
    for name, scene in scenes.items():
        print(greedy_row(name, scene, options.rounds), flush=True)


if __name__ == "__main__":
    main()
