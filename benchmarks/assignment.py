"""Target assignment of FCOS and RetinaNet beside torchvision's: time and agreement, in one run.

    python benchmarks/assignment.py                           # 640 pixels, batch 16, 100 objects per image
    python benchmarks/assignment.py --objects 10 --side 128   # fewer and of up to 128 pixels

Both sides get the same boxes in memory and the same references, laid beforehand, and give one number per reference.
Rounds alternate, the median is shown, and "equal" says whether every reference got the same box. torchvision's code
runs as its models call it: image by image, FCOS's up to the point where its head takes over.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

import torch
from side_by_side.turns import seconds_in_turns
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detseg.models.retinanet import paper_anchors
from detseg.targets.anchors import AnchorGenerator, grid_strides
from detseg.targets.lattice import Lattice, build_lattice
from detseg.targets.points import PointAssigner
from detseg.targets.sparse import SparseIoUMatcher

STRIDES = (8, 16, 32, 64, 128)


class Recorder:
    """Stands where FCOS and its head are, and keeps the matches that the loss would take."""

    center_sampling_radius = 1.5
    matched: list[Tensor]

    @property
    def head(self) -> Recorder:
        """FCOS hands its matches to ``self.head``."""
        return self

    def compute_loss(self, targets: object, outputs: object, anchors: object, matched: list[Tensor]) -> None:
        """Take the matches instead of computing a loss."""
        self.matched = matched


def fcos_of_torchvision(boxes: list[Tensor], lattice: Lattice) -> Tensor:
    recorder = Recorder()
    targets = [{"boxes": box} for box in boxes]
    FCOS.compute_loss(recorder, targets, None, [lattice.boxes] * len(boxes), lattice.counts)
    return torch.stack(recorder.matched)


def retinanet_of_torchvision(boxes: list[Tensor], lattice: Lattice) -> Tensor:
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    return torch.stack([matcher(box_iou(box, lattice.boxes)) for box in boxes])


def draw(batch: int, objects: int, pixels: int, side: float) -> list[Tensor]:
    """Return boxes of 8 to ``side`` pixels per image, ``(objects, 4)`` each, from a seed."""
    generator = torch.Generator().manual_seed(0)
    size = 8 + torch.rand((batch, objects, 2), generator=generator) * (side - 8)
    corner = torch.rand((batch, objects, 2), generator=generator) * (pixels - size)
    return list(torch.cat([corner, corner + size], dim=2))


class Row(NamedTuple):
    """What was measured of one kind of assignment; times in seconds."""

    name: str
    references: int
    positives: int
    own: float
    their: float
    equal: bool


def compare(name: str, boxes: list[Tensor], pixels: int, rounds: int) -> Row:
    """Time both sides on the same boxes.

    Args:
        name: FCOS or RetinaNet.
        boxes: ``(objects, 4)`` xyxy pixels of each image.
        pixels: side of the images.
        rounds: how many are timed.
    """
    fcos = name == "FCOS"
    references = AnchorGenerator(sizes=[[s] for s in STRIDES], ratios=[[1.0]]) if fcos else paper_anchors(STRIDES)
    sizes = [(-(-pixels // stride), -(-pixels // stride)) for stride in STRIDES]
    lattice = build_lattice(references, tuple(sizes), tuple(grid_strides((pixels, pixels), sizes)), "cpu")
    flat, count = torch.cat(boxes), len(boxes[0])
    image = torch.arange(len(boxes)).repeat_interleave(count)
    assign = PointAssigner() if fcos else SparseIoUMatcher()
    theirs = fcos_of_torchvision if fcos else retinanet_of_torchvision

    ours = assign(flat, image, len(boxes), lattice)
    local = torch.where(ours >= 0, ours - torch.arange(len(boxes))[:, None] * count, ours)
    equal = bool((local == theirs(boxes, lattice)).all())
    calls = [lambda: assign(flat, image, len(boxes), lattice), lambda: theirs(boxes, lattice)]
    own, their = (statistics.median(times) for times in seconds_in_turns(calls, rounds))
    return Row(name, lattice.total, int((ours >= 0).sum()), own, their, equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--objects", type=int, default=100, help="per image")
    parser.add_argument("--pixels", type=int, default=640, help="side of the images")
    parser.add_argument("--side", type=float, default=300.0, help="longest side of an object, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    boxes = draw(options.batch, options.objects, options.pixels, options.side)
    print(
        f"{options.batch} images of {options.pixels} pixels, {options.objects} objects each, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':<10} {'references':>10} {'positives':>9} {'detseg ms':>10} {'torchvision ms':>14} {'ratio':>9}  equal")
    for name in ("FCOS", "RetinaNet"):
        row = compare(name, boxes, options.pixels, options.rounds)
        print(
            f"{name:<10} {row.references:>10} {row.positives:>9} {row.own * 1e3:>10.2f} {row.their * 1e3:>14.1f} "
            f"{row.their / row.own:>8.0f}x  {'yes' if row.equal else 'NO'}"
        )


if __name__ == "__main__":
    main()
