"""Dense twins of the sparse assignments: torchvision's own code, image by image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detseg.targets.anchors import AnchorGenerator, grid_strides
from detseg.targets.lattice import Lattice, build_lattice

POINTS = AnchorGenerator(sizes=[[8], [16], [32], [64], [128]], ratios=[[1.0]])
ANCHORS = AnchorGenerator(
    sizes=[[int(4 * stride * 2 ** (octave / 3)) for octave in range(3)] for stride in (8, 16, 32, 64, 128)],
    ratios=[[0.5, 1.0, 2.0]],
)
KINDS = ("any", "aligned", "tiny", "huge", "inside")


def lattice_of(references: AnchorGenerator, height: int, width: int) -> Lattice:
    sizes = [(height // 8, width // 8)]
    for _ in range(4):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return build_lattice(references, tuple(sizes), tuple(grid_strides((height, width), sizes)), "cpu")


def random_boxes(kind: str, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes clipped to the image; "aligned" ones lie on the grid, so that areas and IoUs tie."""
    centre = torch.rand((count, 2), generator=generator) * torch.tensor([width, height])
    draw = torch.rand((count, 2), generator=generator)
    side = {
        "any": torch.exp(draw * 6),
        "aligned": (draw * 10).ceil() * 8,
        "tiny": draw * 6 + 0.05,
        "huge": draw * 2 * width,
        "inside": 8 + draw * 60,
    }[kind]
    if kind == "aligned":
        centre = (centre / 8).round() * 8
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(1)]


def flatten(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(boxes), torch.repeat_interleave(torch.tensor([len(box) for box in boxes]))


def per_image(matched: Tensor, boxes: list[Tensor]) -> Tensor:
    """Rows of the flat boxes -> rows of each image's own, as torchvision counts."""
    counts = torch.tensor([len(box) for box in boxes])
    start = (counts.cumsum(0) - counts)[:, None]
    return torch.where(matched >= 0, matched - start, matched)


def dense_points(boxes: list[Tensor], lattice: Lattice) -> Tensor:
    """What torchvision's FCOS assigns: its ``compute_loss`` hands the matches to the head, which keeps them here."""

    class Recorder:
        def compute_loss(self, targets: object, outputs: object, anchors: object, matched: list[Tensor]) -> None:
            self.matched = matched

    class Stand:
        center_sampling_radius = 1.5
        head = Recorder()

    stand = Stand()
    FCOS.compute_loss(stand, [{"boxes": box} for box in boxes], None, [lattice.boxes] * len(boxes), lattice.counts)
    return torch.stack(stand.head.matched)


def dense_anchors(boxes: list[Tensor], lattice: Lattice, *, low_quality: bool = True) -> Tensor:
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)
    none = torch.full((lattice.total,), -1)
    return torch.stack([matcher(box_iou(box, lattice.boxes)) if len(box) else none for box in boxes])
