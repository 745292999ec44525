"""Task-aligned assignment of ours beside Ultralytics': time and agreement.

Both get the same boxes, classes, predicted boxes and scores of a batch, and give one object per cell with what it shall
score. Two scenes: ``drawn`` is that of ``benchmarks/assignment.py``, with predictions about their cells, for the time.
There the definitions differ: Ultralytics takes CIoU where the paper and we take IoU, so that some cells go elsewhere.
In ``apart`` no objects overlap and every prediction has its object's centre and shape, whence CIoU is IoU: there every
cell must agree.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from assignment import draw
from side_by_side import peer
from torch import Tensor

from detseg.targets.anchors import grid_strides
from detseg.targets.lattice import Lattice, build_lattice
from detseg.targets.points import CellGrid
from detseg.targets.task_aligned import Predictions, TaskAlignedAssigner

STRIDES = (8, 16, 32)
CLASSES = 80
TOP_K, ALPHA, BETA = 10, 0.5, 6.0  # of later YOLO detectors, ours and Ultralytics' alike


class Scene(NamedTuple):
    """Objects and predictions of a batch.

    Attributes:
        boxes: ``(B, G, 4)`` xyxy pixels, G objects in every image.
        classes: ``(B, G)`` int64.
        predicted: ``(B, N, 4)`` xyxy pixels.
        logits: ``(B, N, K)``.
    """

    boxes: Tensor
    classes: Tensor
    predicted: Tensor
    logits: Tensor


def lattice_of(pixels: int) -> Lattice:
    """Return the cells of a square image."""
    sizes = tuple((-(-pixels // stride),) * 2 for stride in STRIDES)
    return build_lattice(CellGrid(), sizes, tuple(grid_strides((pixels, pixels), sizes)), "cpu")


def drawn(batch: int, objects: int, pixels: int, side: float, lattice: Lattice) -> Scene:
    """Return overlapping objects, and predictions of a stride to some strides about each cell."""
    boxes = torch.stack(draw(batch, objects, pixels, side))  # (B, G, 4)
    centre = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2  # (N, 2)
    stride = (lattice.boxes[:, 2:] - lattice.boxes[:, :2]).repeat(1, 2)  # (N, 4)
    generator = torch.Generator().manual_seed(1)
    reach = stride * torch.exp(torch.randn((batch, lattice.total, 4), generator=generator) * 0.7 + 0.7)  # (B, N, 4)
    predicted = torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], dim=2)
    return _with_classes(boxes, predicted, generator)


def apart(batch: int, pixels: int, lattice: Lattice) -> Scene:
    """Return 100 objects in a grid; each cell predicts that of its tile, larger or smaller by a factor."""
    generator = torch.Generator().manual_seed(2)
    tile = pixels / 10
    middle = (torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0)) + 0.5) * tile  # (100, 2)
    half = tile * (0.27 + 0.2 * torch.rand((batch, 100, 2), generator=generator))  # (B, 100, 2): larger than a stride
    boxes = torch.cat([middle - half, middle + half], dim=2)  # (B, 100, 4)
    centre = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2  # (N, 2)
    x, y = (centre / tile).long().clamp(max=9).unbind(1)  # (N,) each
    own = x * 10 + y  # (N,) the object of the tile that a cell's centre lies in
    factor = 0.6 + torch.rand((batch, lattice.total, 1), generator=generator)  # (B, N, 1)
    grown = half[:, own] * factor  # (B, N, 2)
    return _with_classes(boxes, torch.cat([middle[own] - grown, middle[own] + grown], dim=2), generator)


def _with_classes(boxes: Tensor, predicted: Tensor, generator: torch.Generator) -> Scene:
    classes = torch.randint(0, CLASSES, boxes.shape[:2], generator=generator)
    logits = torch.randn((*predicted.shape[:2], CLASSES), generator=generator) * 1.5 - 2
    return Scene(boxes, classes, predicted, logits)


def ours(scene: Scene, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return the object of each cell ``(B, N)``, counted through the batch, and what it shall score ``(B, N)``."""
    batch, count = scene.classes.shape
    image = torch.arange(batch).repeat_interleave(count)  # (B * G,)
    flat = scene.predicted.flatten(0, 1)  # (B * N, 4)
    seen = Predictions(scene.logits.flatten(0, 1), lambda rows: flat.index_select(0, rows))
    assigner = TaskAlignedAssigner(top_k=TOP_K, alpha=ALPHA, beta=BETA)
    return assigner.align(scene.boxes.flatten(0, 1), scene.classes.flatten(), image, batch, lattice, seen)


def theirs(scene: Scene, lattice: Lattice, rounds: int, python: Path) -> dict[str, Tensor]:
    """Return ``matched`` and ``scores`` ``(B, N)`` of Ultralytics, and the ``seconds`` of each round."""
    given = {
        "pd_scores": scene.logits.sigmoid(),
        "pd_bboxes": scene.predicted,
        "anc_points": (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2,
        "gt_labels": scene.classes[..., None],
        "gt_bboxes": scene.boxes,
        "mask_gt": torch.ones(*scene.classes.shape, 1),
        "settings": {"topk": TOP_K, "num_classes": CLASSES, "alpha": ALPHA, "beta": BETA},
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder) / "assign.pt")
        peer.call(python, "assign", Path(folder))
        result: dict[str, Tensor] = torch.load(Path(folder) / "assigned.pt", weights_only=True)
    return result


def row(name: str, scene: Scene, lattice: Lattice, rounds: int, python: Path) -> list[str]:
    """Time ours, theirs, and ours again; return a row of the table."""
    ours(scene, lattice)  # warms up
    seconds = _seconds(scene, lattice, rounds)
    answer = theirs(scene, lattice, rounds, python)
    seconds += _seconds(scene, lattice, rounds)
    matched, scores = ours(scene, lattice)  # (B, N) each
    batch, count = scene.classes.shape
    local = torch.where(matched >= 0, matched - torch.arange(batch)[:, None] * count, -1)  # (B, N)
    same = local == answer["matched"]  # (B, N)
    either = (local >= 0) | (answer["matched"] >= 0)  # (B, N)
    share = float((same & either).sum() / either.sum())
    gap = float((scores - answer["scores"])[same].abs().max())
    own, their = statistics.median(seconds), statistics.median(answer["seconds"])
    verdict = f"yes, scores to {gap:.0e}" if bool(same.all()) and gap < 1e-3 else f"{share:.1%} of the matched cells"
    times = [f"{own * 1e3:.2f}", f"{their * 1e3:.1f}", f"{their / own:.0f}x"]
    return [f"task-aligned ({name}), Ultralytics", str(lattice.total), str(int((matched >= 0).sum())), *times, verdict]


def _seconds(scene: Scene, lattice: Lattice, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        ours(scene, lattice)
        taken.append(time.perf_counter() - start)
    return taken
