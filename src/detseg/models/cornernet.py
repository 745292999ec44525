"""CornerNet: Law and Deng, CornerNet: Detecting Objects as Paired Keypoints, 2018, arXiv:1808.01244.

An object is a pair of peaks, its top-left and its bottom-right corner (section 3). Each corner has a heatmap per class,
an embedding by which the two of an object find each other, and the offset in its cell; features are pooled along rows
and columns first (figure 7). Redundant boxes are thinned by Soft-NMS (section 4.1).

Differs: pull and push are means over the images of a batch, where the published code sums them over the five or so of a
GPU, so that its weights of 0.1 are worth 0.5 here. Where several objects share the cell of a corner the smallest says
the offset there, while all take part in pull and push. Crowd regions teach nothing. An image is read once, not mirrored
too. The images of a batch are decoded together, each with its own corners.

Letters: B images, K classes, G objects of all images, Q objects that own the cell of a corner, n corners of one kind in
one image, m pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.grouping import GroupingLoss
from detseg.losses.heatmap import HeatmapFocalLoss
from detseg.losses.normalise import normaliser
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.heatmap import PRIOR, HeatmapDetector, HeatmapOutputs, Maps, blank_padding, prediction, read_cells
from detseg.nn.backbone import Backbone
from detseg.ops.corner_pool import bottom_right_pool, top_left_pool
from detseg.ops.nms import Suppression
from detseg.ops.peaks import local_maxima, top_peaks
from detseg.ops.soft_nms import SoftNMS
from detseg.structures import Detections, Target
from detseg.targets.heatmaps import CellObjects, GaussianHeatmaps, cells_of, crowd_cells, objects_in_cells, own_cells

CORNERS = ("top_left", "bottom_right")


class CornerTruth(NamedTuple):
    """What the maps of one kind of corner shall say.

    Attributes:
        heat: ``(B, K, H, W)``.
        cells: ``(G, 2)`` int64 (column, row) of every object's corner.
        own: ``(Q,)`` int64 objects that own the cell.
        offsets: ``(G, 2)`` x and y of the corner in its cell, in [0, 1].
    """

    heat: Tensor
    cells: Tensor
    own: Tensor
    offsets: Tensor


class PairTruth(NamedTuple):
    """What the maps of a batch shall say.

    Attributes:
        corners: by the name of the corner.
        image: ``(G,)`` int64, the image of each object, ascending.
        batch: the number B of images.
        ignored: ``(B, H, W)`` bool cells that teach nothing, or ``None``.
        number: scalar, by which sums over objects are divided.
    """

    corners: dict[str, CornerTruth]
    image: Tensor
    batch: int
    ignored: Tensor | None
    number: Tensor


class Corners(NamedTuple):
    """The best corners of one kind, ``(B, n)`` each.

    Attributes:
        points: ``(B, n, 2)`` x and y in cells.
        scores: in [0, 1], descending.
        labels: int64.
        tags: embeddings.
    """

    points: Tensor
    scores: Tensor
    labels: Tensor
    tags: Tensor


class CornerPool(nn.Module):
    """The block around corner pooling (figure 7), of one kind of corner.

    Args:
        kind: ``top_left`` or ``bottom_right``.
        channels: in and out.
        width: of the two maps that are pooled.
    """

    def __init__(self, *, kind: str, channels: int, width: int) -> None:
        super().__init__()
        self.pool = top_left_pool if kind == "top_left" else bottom_right_pool
        self.columns = _convolution(channels, width)
        self.rows = _convolution(channels, width)
        self.pooled = _convolution(width, channels, relu=False)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.last = _convolution(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``(B, channels, H, W)``."""
        pooled = self.pool(self.columns(maps), self.rows(maps))  # (B, width, H, W)
        result: Tensor = self.last(F.relu(self.pooled(pooled) + self.shortcut(maps)))
        return result


class CornerHead(nn.Module):
    """Corner pooling, then heatmap, embedding and offset of one kind of corner."""

    def __init__(self, *, kind: str, channels: int, pool_width: int, num_classes: int) -> None:
        super().__init__()
        self.pool = CornerPool(kind=kind, channels=channels, width=pool_width)
        self.heat = prediction(channels, channels, num_classes, prior=PRIOR)
        self.tag = prediction(channels, channels, 1)
        self.offset = prediction(channels, channels, 2)

    def forward(self, maps: Tensor) -> Maps:
        """Return ``heat`` (B, K, H, W) logits, ``tag`` (B, 1, H, W) and ``offset`` (B, 2, H, W)."""
        maps = self.pool(maps)  # (B, channels, H, W)
        return {"heat": self.heat(maps), "tag": self.tag(maps), "offset": self.offset(maps)}


class CornerNetHead(nn.Module):
    """Both kinds of corners, which share no weights.

    Args:
        channels: of the map that it reads, and of all predictions.
        pool_width: channels of the maps that are pooled.
        num_classes: K.
    """

    def __init__(self, *, channels: int, pool_width: int, num_classes: int) -> None:
        super().__init__()
        self.top_left, self.bottom_right = (
            CornerHead(kind=kind, channels=channels, pool_width=pool_width, num_classes=num_classes) for kind in CORNERS
        )

    def forward(self, maps: Tensor) -> Maps:
        """Return the maps of both corners, as ``top_left_heat`` and so on; see ``CornerHead``."""
        found = {"top_left": self.top_left(maps), "bottom_right": self.bottom_right(maps)}
        return {f"{corner}_{name}": value for corner, named in found.items() for name, value in named.items()}


class CornerNet(HeatmapDetector[PairTruth]):
    """The detector of pairs of corners.

    Args:
        num_classes: foreground classes.
        backbone: gives one map, or several of one stride; in the paper Hourglass-104.
        pool_width: channels of the maps that corner pooling reads; 128 in the paper.
        heatmaps: draws the truth; ``None`` gives Gaussians with a least overlap of 0.3.
        heatmap_loss: ``None`` gives the penalty-reduced focal loss with alpha 2 and beta 4.
        grouping_loss: of embeddings; ``None`` gives a margin of 1.
        offset_loss: ``None`` gives smooth L1 with its turning point at 1.
        pull_weight: alpha of the paper.
        push_weight: beta of the paper.
        offset_weight: gamma of the paper.
        nms: of boxes; ``None`` gives Gaussian Soft-NMS.
        peak_kernel: odd side in cells of the window in which a peak is the largest.
        top_k: corners of each kind that are read per image.
        max_distance: of the embeddings of two corners that may be one object's.
        max_pairs: how many pairs go to NMS.
        score_threshold: detections must score higher, in [0, 1).
        max_detections: how many detections per image stay.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        pool_width: int = 128,
        heatmaps: GaussianHeatmaps | None = None,
        heatmap_loss: HeatmapFocalLoss | None = None,
        grouping_loss: GroupingLoss | None = None,
        offset_loss: SmoothL1 | None = None,
        pull_weight: float = 0.1,
        push_weight: float = 0.1,
        offset_weight: float = 1.0,
        nms: Suppression | None = None,
        peak_kernel: int = 3,
        top_k: int = 100,
        max_distance: float = 0.5,
        max_pairs: int = 1000,
        score_threshold: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        heads = [
            CornerNetHead(channels=channels, pool_width=pool_width, num_classes=num_classes)
            for channels in backbone.channels
        ]
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            heads=heads,
            nms=nms or SoftNMS(method="gaussian"),
            peak_kernel=peak_kernel,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        self.heatmaps = heatmaps or GaussianHeatmaps(min_overlap=0.3)
        self.heatmap_loss = heatmap_loss or HeatmapFocalLoss()
        self.grouping_loss = grouping_loss or GroupingLoss()
        self.offset_loss = offset_loss or SmoothL1(beta=1.0)
        self.pull_weight, self.push_weight, self.offset_weight = pull_weight, push_weight, offset_weight
        self.top_k, self.max_distance, self.max_pairs = top_k, max_distance, max_pairs

    def truth(self, outputs: HeatmapOutputs, targets: list[Target]) -> PairTruth:
        """Return what the maps of a batch shall say; without gradients, each rank counts its own objects alone."""
        heat = outputs.stacks[-1]["top_left_heat"]  # (B, K, H, W)
        shape = heat.shape[0], heat.shape[1], heat.shape[2], heat.shape[3]
        objects = objects_in_cells(targets, outputs.image_size, outputs.stride, heat)
        points = zip(CORNERS, (objects.boxes[:, :2], objects.boxes[:, 2:]), strict=True)
        return PairTruth(
            corners={corner: self._corner_truth(objects, point, shape) for corner, point in points},
            image=objects.image,
            batch=shape[0],
            ignored=crowd_cells(targets, shape[2:], outputs.stride, heat),
            number=normaliser(heat.new_tensor(len(objects.boxes), dtype=torch.int64)),
        )

    def _corner_truth(self, objects: CellObjects, points: Tensor, shape: tuple[int, int, int, int]) -> CornerTruth:
        cells = cells_of(points, shape[2:])  # (G, 2)
        own = own_cells(objects, cells, shape[0], shape[2:])  # (Q,)
        return CornerTruth(self.heatmaps(objects, cells, shape), cells, own, points - cells)

    def terms(self, maps: Maps, truth: PairTruth) -> dict[str, Tensor]:
        """Return ``loss_heatmap``, ``loss_pull``, ``loss_push`` and ``loss_offset`` of one head, weighted.

        Equations 1 to 5 and 10; heatmaps and offsets are summed over both kinds of corners.
        """
        heat, offset, tags = [], [], []
        for corner, wanted in truth.corners.items():
            heat.append(self.heatmap_loss(maps[f"{corner}_heat"], wanted.heat, truth.ignored))
            cols, rows = wanted.cells[wanted.own].unbind(1)  # (Q,) each
            found = read_cells(maps[f"{corner}_offset"], truth.image[wanted.own], rows, cols)  # (Q, 2)
            offset.append(self.offset_loss(found, wanted.offsets[wanted.own]))
            cols, rows = wanted.cells.unbind(1)  # (G,) each
            tags.append(read_cells(maps[f"{corner}_tag"], truth.image, rows, cols)[:, 0])  # (G,)
        pull, push = self.grouping_loss(tags[0], tags[1], truth.image, truth.batch)
        return {
            "loss_heatmap": (heat[0] + heat[1]) / truth.number,
            "loss_pull": self.pull_weight * pull,
            "loss_push": self.push_weight * push,
            "loss_offset": self.offset_weight * (offset[0] + offset[1]) / truth.number,
        }

    @torch.no_grad()
    def predict(self, outputs: HeatmapOutputs, sizes: Tensor) -> list[Detections]:
        """Return pairs of corners, best first, clipped to ``sizes`` (B, 2); see ``Detector.predict``.

        A pair is two corners of one class whose embeddings are close, the second below and to the right of the first;
        it scores their mean (section 4.1).
        """
        first, second = (self._corners(outputs, corner, sizes) for corner in CORNERS)
        boxes, scores, labels = self._pairs(first, second)
        return self.select(boxes * outputs.stride, scores, labels, sizes)

    def _corners(self, outputs: HeatmapOutputs, corner: str, sizes: Tensor) -> Corners:
        heat = blank_padding(outputs.read(f"{corner}_heat"), sizes, outputs.stride)  # (B, K, H, W)
        peaks = top_peaks(local_maxima(heat, self.peak_kernel), self.top_k)  # (B, n) each
        image = torch.arange(len(heat), device=heat.device)[:, None]  # (B, 1)
        cells = torch.stack((peaks.cols, peaks.rows), dim=-1)  # (B, n, 2)
        points = cells + read_cells(outputs.read(f"{corner}_offset"), image, peaks.rows, peaks.cols)  # (B, n, 2)
        tags = read_cells(outputs.read(f"{corner}_tag"), image, peaks.rows, peaks.cols)[..., 0]  # (B, n)
        return Corners(points, peaks.values.sigmoid(), peaks.labels, tags)

    def _pairs(self, first: Corners, second: Corners) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes ``(B, m, 4)`` in cells, scores ``(B, m)`` and labels ``(B, m)`` of the best pairs."""
        scores = (first.scores[:, :, None] + second.scores[:, None]) / 2  # (B, n, n)
        close = (first.tags[:, :, None] - second.tags[:, None]).abs() <= self.max_distance  # (B, n, n)
        alike = first.labels[:, :, None] == second.labels[:, None]  # (B, n, n)
        ahead = (second.points[:, None] > first.points[:, :, None]).all(-1)  # (B, n, n)
        both = (first.scores[:, :, None] > 0) & (second.scores[:, None] > 0)  # (B, n, n) no pair with a mere filler
        scores = scores.where(close & alike & ahead & both, 0.0).flatten(1)  # (B, n * n)
        scores, index = scores.topk(min(self.max_pairs, scores.shape[1]))  # (B, m) each
        image = torch.arange(len(index), device=index.device)[:, None]  # (B, 1)
        left, right = index // second.tags.shape[1], index % second.tags.shape[1]  # (B, m) each
        boxes = torch.cat([first.points[image, left], second.points[image, right]], dim=-1)  # (B, m, 4)
        return boxes, scores, first.labels.gather(1, left)

    @torch.no_grad()
    def diagnostics(self, outputs: HeatmapOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``grouped_corners`` is the share of the batch's objects whose own two corners have embeddings close enough to
        be paired, 0 without objects; ``corner_score`` the mean probability of the own class at true corners.
        """
        truth = self.truth(outputs, targets)
        tags, scores = [], []
        for corner, wanted in truth.corners.items():
            cols, rows = wanted.cells.unbind(1)  # (G,) each
            tags.append(read_cells(outputs.read(f"{corner}_tag"), truth.image, rows, cols)[:, 0])  # (G,)
            scores.append(outputs.read(f"{corner}_heat").sigmoid()[wanted.heat == 1])  # (P,)
        close = ((tags[0] - tags[1]).abs() <= self.max_distance).float()  # (G,)
        score = torch.cat(scores)  # (P + P',)
        return {"grouped_corners": close.sum() / max(1, len(close)), "corner_score": score.sum() / max(1, len(score))}


def _convolution(before: int, after: int, *, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))
