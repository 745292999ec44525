"""CenterNet: Zhou, Wang and Kraehenbuehl, Objects as Points, 2019, arXiv:1904.07850.

An object is the peak of its class' heatmap at the centre of its box; its size, and where in the cell the centre lies,
are read there (section 3, equations 1 to 4). Peaks stand in for NMS; one can be added. On any backbone that gives a map
of one stride: DLA-34 or a ResNet with up-sampling, or the stacked hourglass.

Differs: the head says sizes in cells, so that its numbers are small, while the loss is of pixels, as in the paper. The
published code counts both losses of an object as the mean of their two numbers, here they are the sum of equations 2
and 3. Where several objects share a centre cell, whatever their classes, the smallest of them says its size and
offset, where the published code averages their losses; each has its peak. Crowd regions teach nothing. An image is
read once, not mirrored too.

Letters: B images, K classes, G objects of all images, Q objects that own their centre cell, n peaks of one image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detseg.losses.heatmap import HeatmapFocalLoss
from detseg.losses.normalise import normaliser
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.heatmap import PRIOR, HeatmapDetector, HeatmapOutputs, Maps, blank_padding, prediction, read_cells
from detseg.nn.backbone import Backbone
from detseg.ops.nms import Suppression
from detseg.ops.peaks import local_maxima, top_peaks
from detseg.structures import Detections, Target
from detseg.targets.heatmaps import GaussianHeatmaps, cells_of, crowd_cells, objects_in_cells, own_cells


class CentreTruth(NamedTuple):
    """What the maps of a batch shall say.

    Attributes:
        heat: ``(B, K, H, W)``.
        ignored: ``(B, H, W)`` bool cells that teach nothing, or ``None``.
        image: ``(Q,)`` int64, of the objects that own their cell.
        cells: ``(Q, 2)`` int64 (column, row).
        offsets: ``(Q, 2)`` x and y of the centre in its cell, in [0, 1], in cells.
        sizes: ``(Q, 2)`` width and height in cells.
        number: scalar, by which every sum is divided: the objects of the batch.
        shared: scalar, the share of objects whose cell belongs to another.
        stride: pixels per cell.
    """

    heat: Tensor
    ignored: Tensor | None
    image: Tensor
    cells: Tensor
    offsets: Tensor
    sizes: Tensor
    number: Tensor
    shared: Tensor
    stride: int


class CenterNetHead(nn.Module):
    """A heatmap per class, the offset and the size, each after a 3x3 convolution of its own.

    Args:
        channels: of the map that it reads.
        width: channels of the 3x3 convolutions.
        num_classes: K.
    """

    def __init__(self, *, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.heat = prediction(channels, width, num_classes, prior=PRIOR)
        self.offset = prediction(channels, width, 2)
        self.size = prediction(channels, width, 2)

    def forward(self, maps: Tensor) -> Maps:
        """Return ``heat`` (B, K, H, W) logits, ``offset`` (B, 2, H, W) and ``size`` (B, 2, H, W) in cells."""
        return {"heat": self.heat(maps), "offset": self.offset(maps), "size": self.size(maps)}


class CenterNet(HeatmapDetector[CentreTruth]):
    """The detector of centres.

    Args:
        num_classes: foreground classes.
        backbone: gives one map, or several of one stride; in the paper of stride 4.
        head_width: channels of the 3x3 convolution before each prediction; the paper has 256, on ResNets 64.
        heatmaps: draws the truth; ``None`` gives Gaussians with a least overlap of 0.7.
        heatmap_loss: ``None`` gives the penalty-reduced focal loss with alpha 2 and beta 4.
        regression_loss: of offsets and of sizes; ``None`` gives L1.
        offset_weight: of the offsets' loss, in cells; lambda_off of the paper.
        size_weight: of the sizes' loss, in pixels; lambda_size of the paper.
        nms: of peaks; ``None`` is without, as in the paper.
        peak_kernel: odd side in cells of the window in which a peak is the largest.
        score_threshold: detections must score higher, in [0, 1).
        max_detections: how many peaks per image are read.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        head_width: int = 256,
        heatmaps: GaussianHeatmaps | None = None,
        heatmap_loss: HeatmapFocalLoss | None = None,
        regression_loss: SmoothL1 | None = None,
        offset_weight: float = 1.0,
        size_weight: float = 0.1,
        nms: Suppression | None = None,
        peak_kernel: int = 3,
        score_threshold: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            heads=[
                CenterNetHead(channels=channels, width=head_width, num_classes=num_classes)
                for channels in backbone.channels
            ],
            nms=nms,
            peak_kernel=peak_kernel,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        self.heatmaps = heatmaps or GaussianHeatmaps(min_overlap=0.7)
        self.heatmap_loss = heatmap_loss or HeatmapFocalLoss()
        self.regression_loss = regression_loss or SmoothL1(beta=0.0)
        self.offset_weight = offset_weight
        self.size_weight = size_weight

    def truth(self, outputs: HeatmapOutputs, targets: list[Target]) -> CentreTruth:
        """Return what the maps of a batch shall say; without gradients, each rank counts its own objects alone."""
        heat = outputs.stacks[-1]["heat"]  # (B, K, H, W)
        batch, _, height, width = heat.shape
        objects = objects_in_cells(targets, outputs.image_size, outputs.stride, heat)
        corners = objects.boxes.view(-1, 2, 2)  # (G, 2, 2)
        centres, sizes = corners.mean(1), corners[:, 1] - corners[:, 0]  # (G, 2) each
        cells = cells_of(centres, (height, width))  # (G, 2)
        own = own_cells(objects, cells, batch, (height, width))  # (Q,)
        return CentreTruth(
            heat=self.heatmaps(objects, cells, (batch, self.num_classes, height, width)),
            ignored=crowd_cells(targets, (height, width), outputs.stride, heat),
            image=objects.image[own],
            cells=cells[own],
            offsets=(centres - cells)[own],
            sizes=sizes[own],
            number=normaliser(heat.new_tensor(len(cells), dtype=torch.int64)),
            shared=heat.new_tensor((len(cells) - len(own)) / max(1, len(cells)), dtype=torch.float32),
            stride=outputs.stride,
        )

    def terms(self, maps: Maps, truth: CentreTruth) -> dict[str, Tensor]:
        """Return ``loss_heatmap``, ``loss_offset`` and ``loss_size`` of one head (equation 4), weighted."""
        cols, rows = truth.cells.unbind(1)  # (Q,) each
        offsets = read_cells(maps["offset"], truth.image, rows, cols)  # (Q, 2)
        sizes = read_cells(maps["size"], truth.image, rows, cols)  # (Q, 2)
        terms = {
            "loss_heatmap": self.heatmap_loss(maps["heat"], truth.heat, truth.ignored),
            "loss_offset": self.offset_weight * self.regression_loss(offsets, truth.offsets),
            "loss_size": self.size_weight * self.regression_loss(sizes * truth.stride, truth.sizes * truth.stride),
        }
        return {name: term / truth.number for name, term in terms.items()}

    @torch.no_grad()
    def predict(self, outputs: HeatmapOutputs, sizes: Tensor) -> list[Detections]:
        """Return the objects at the best peaks, best first, clipped to ``sizes`` (B, 2); see ``Detector.predict``."""
        heat = blank_padding(outputs.read("heat"), sizes, outputs.stride)  # (B, K, H, W)
        peaks = top_peaks(local_maxima(heat, self.peak_kernel), self.max_detections)  # (B, n) each
        image = torch.arange(len(heat), device=heat.device)[:, None]  # (B, 1)
        cells = torch.stack((peaks.cols, peaks.rows), dim=-1)  # (B, n, 2)
        centres = cells + read_cells(outputs.read("offset"), image, peaks.rows, peaks.cols)  # (B, n, 2)
        half = read_cells(outputs.read("size"), image, peaks.rows, peaks.cols).clamp(min=0) / 2  # (B, n, 2)
        boxes = torch.cat([centres - half, centres + half], dim=-1) * outputs.stride  # (B, n, 4)
        return self.select(boxes, peaks.values.sigmoid(), peaks.labels, sizes)

    @torch.no_grad()
    def diagnostics(self, outputs: HeatmapOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return what only this family has, scalars.

        ``shared_centres`` is the share of the batch's objects whose centre cell belongs to a smaller one (the paper
        finds less than 0.1 % on COCO at stride 4, appendix C); ``centre_score`` is the mean probability of the own
        class at the centres of objects, 0 without any.
        """
        truth = self.truth(outputs, targets)
        score = outputs.read("heat").sigmoid()[truth.heat == 1]  # (P,)
        return {"shared_centres": truth.shared, "centre_score": score.sum() / max(1, len(score))}
