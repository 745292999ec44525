"""YOLO: Redmon, Divvala, Girshick & Farhadi, You Only Look Once: Unified, Real-Time Object Detection, 2016.

arXiv:1506.02640. Built: an S x S grid of which each cell predicts X boxes with a confidence each and one vector of
classes (section 2), the sum of squares of equation 3 with the roots of the sides, the box of the highest IoU answering
for an object, two fully connected layers on the 24 convolutions (figure 3).

Differs from the paper: a head of convolutions may take the place of the fully connected layers, so that any image size
works (the grid grows then, sides stay in units of ``image_size``); the loss is divided by the objects of the batch, so
that learning rates do not depend on crowds; where no box of a cell overlaps its object, that of the smallest squared
distance answers, as in the paper's code; crowd regions teach nothing.

Letters: B images, N cells of one image, X boxes per cell, K classes, G objects of all images, P cells with an object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.normalise import normaliser
from detseg.losses.squared import squared_error
from detseg.models.dense import CROWD_OVERLAP, best_per_group
from detseg.nn.backbone import Backbone
from detseg.nn.darknet import SLOPE, dark_convolution
from detseg.nn.normalize import Normalize
from detseg.ops.nms import BatchedNMS, Suppression, suppress_per_image
from detseg.structures import Detections, Target
from detseg.targets.cells import cell_objects
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.sparse import paired_iou


@dataclass
class CellOutputs:
    """What the network says about every cell, row by row.

    Attributes:
        classes: ``(B, N, K)``, the probability of each class where the cell has an object; plain numbers that learn
            to lie in [0, 1].
        boxes: ``(B, N, X, 4)``: the centre's x and y in cells from the cell's corner, and the roots of width and
            height in units of the model's image size.
        confidence: ``(B, N, X)``, likewise plain: the IoU with an object.
        grid: (rows, columns); N is their product.
    """

    classes: Tensor
    boxes: Tensor
    confidence: Tensor
    grid: tuple[int, int]


class YOLOv1(nn.Module):
    """The detector of one look.

    Args:
        num_classes: K foreground classes.
        backbone: its last map is the grid: S = image side / stride.
        image_size: pixels, one side or (height, width): the unit of boxes' sides, and with ``hidden`` the only size
            that the network takes.
        boxes_per_cell: X.
        hidden: width of the fully connected layer between map and predictions; ``None``: two convolutions instead.
        dropout: after the fully connected layer.
        coordinate_weight: factor of the boxes' loss (the paper's lambda_coord).
        empty_weight: factor of the confidence of boxes without object (lambda_noobj).
        nms: ``None`` gives NMS per class at IoU 0.5.
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per image go to NMS.
        max_detections: how many detections per image stay.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        image_size: int | Sequence[int] = 448,
        boxes_per_cell: int = 2,
        hidden: int | None = 4096,
        dropout: float = 0.5,
        coordinate_weight: float = 5.0,
        empty_weight: float = 0.5,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        top_k: int = 1000,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.stride = backbone.strides[-1]
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (int(height), int(width))
        self.boxes_per_cell = boxes_per_cell
        self.fixed_size = hidden is not None
        numbers = 5 * boxes_per_cell + num_classes
        if hidden is None:
            self.head = _convolved_head(backbone.channels[-1], numbers)
        else:
            cells = math.prod(math.ceil(side / self.stride) for side in self.image_size)
            self.head = _connected_head(backbone.channels[-1], cells, numbers, hidden=hidden, dropout=dropout)
        self.coordinate_weight = coordinate_weight
        self.empty_weight = empty_weight
        self.nms = nms or BatchedNMS(threshold=0.5)
        self.score_threshold = score_threshold
        self.top_k = top_k
        self.max_detections = max_detections

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> CellOutputs:
        """Run the network on ``(B, 3, H, W)`` RGB in [0, 1]; ``targets`` are not read. See ``Detector.forward``.

        Raises:
            ValueError: the fully connected layers are for images of another size.
        """
        size = (images.shape[2], images.shape[3])
        if self.fixed_size and size != self.image_size:
            raise ValueError(
                f"YOLOv1: its fully connected layers take images of {self.image_size[0]} x {self.image_size[1]} pixels "
                f"(height x width), but these are {size[0]} x {size[1]}; resize them (data.train_transform.size and "
                "data.eval_transform.size), set model.image_size, or model.hidden=null for a head of any size"
            )
        features = self.backbone(self.normalize(images, sizes))[-1]  # (B, C, S, S)
        grid = (features.shape[2], features.shape[3])
        flat = self.head(features).reshape(len(images), grid[0] * grid[1], -1)  # (B, N, 5 X + K)
        boxes = flat[..., : 5 * self.boxes_per_cell].unflatten(2, (self.boxes_per_cell, 5))  # (B, N, X, 5)
        return CellOutputs(flat[..., 5 * self.boxes_per_cell :], boxes[..., :4], boxes[..., 4], grid)

    def loss(self, outputs: CellOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return the parts of equation 3 per object: ``loss_box``, ``loss_confidence`` and ``loss_classification``."""
        taught = [learnable(target) for target in targets]
        objects = torch.cat([target.boxes for target in taught]).to(outputs.boxes.device).float()  # (G, 4)
        image = torch.repeat_interleave(torch.tensor([len(target) for target in taught])).to(objects.device)  # (G,)
        matched = cell_objects(objects, image, len(targets), outputs.grid, self.stride)  # (B, N)
        rows = (matched.flatten() >= 0).nonzero()[:, 0]  # (P,)
        mine = matched.flatten()[rows]  # (P,)
        cells = self._corners(outputs.grid, objects.device)[rows % matched.shape[1]]  # (P, 2)
        boxes = outputs.boxes.flatten(0, 1)[rows].float()  # (P, X, 4)
        best, iou = self._responsible(boxes, cells, objects[mine])  # (P,) each
        place = torch.arange(len(rows), device=rows.device)  # (P,)
        box_loss = squared_error(boxes[place, best], self._encode(objects[mine], cells))

        confidence = outputs.confidence.float().flatten(0, 1)  # (B * N, X)
        wanted, weights = torch.zeros_like(confidence), self._empty_weights(matched, targets, outputs)
        wanted[rows, best], weights[rows, best] = iou, 1.0
        confidence_loss = (weights * (confidence - wanted).square()).sum()

        labels = torch.cat([target.labels for target in taught]).to(objects.device)[mine]  # (P,)
        classes = outputs.classes.flatten(0, 1)[rows].float()  # (P, K)
        class_loss = squared_error(classes, F.one_hot(labels, self.num_classes).to(classes))
        count = normaliser(torch.ones_like(rows).sum())
        return {
            "loss_box": self.coordinate_weight * box_loss / count,
            "loss_confidence": confidence_loss / count,
            "loss_classification": class_loss / count,
        }

    @torch.no_grad()
    def predict(self, outputs: CellOutputs, sizes: Tensor) -> list[Detections]:
        """Return detections per image, scored by class times confidence (equation 1); see ``Detector.predict``."""
        confidence = outputs.confidence.float().clamp(0, 1)[..., None]  # (B, N, X, 1)
        scores = confidence * outputs.classes.float().clamp(0, 1)[:, :, None]  # (B, N, X, K)
        image, cell, which, label = (scores > self.score_threshold).nonzero().unbind(1)  # (C,) each
        score = scores[image, cell, which, label]  # (C,)
        keep = best_per_group(score, image, self.top_k, threshold=self.score_threshold)
        image, cell, which, label, score = (part[keep] for part in (image, cell, which, label, score))
        corners = self._corners(outputs.grid, score.device)[cell]  # (C, 2)
        boxes = self._decode(outputs.boxes[image, cell, which].float(), corners)  # (C, 4)
        return suppress_per_image(boxes, score, label, image, sizes, nms=self.nms, most=self.max_detections)

    @torch.no_grad()
    def _responsible(self, boxes: Tensor, cells: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return which box of each cell answers for its object ``(P,)``, and its IoU with it ``(P,)``."""
        decoded = self._decode(boxes, cells[:, None])  # (P, X, 4)
        repeated = truth[:, None].expand_as(decoded)  # (P, X, 4)
        iou = paired_iou(decoded.reshape(-1, 4), repeated.reshape(-1, 4)).view(boxes.shape[:2])  # (P, X)
        far = (_centre_side(decoded) - _centre_side(repeated)).square().sum(dim=2)  # (P, X)
        best = torch.where(iou.amax(dim=1) > 0, iou.argmax(dim=1), far.argmin(dim=1))  # (P,)
        return best, iou.gather(1, best[:, None])[:, 0]

    @torch.no_grad()
    def _empty_weights(self, matched: Tensor, targets: list[Target], outputs: CellOutputs) -> Tensor:
        """Return the weights of boxes without object ``(B * N, X)``: 0 in a crowd's cells that have no object."""
        weights = torch.full_like(outputs.confidence, self.empty_weight, dtype=torch.float32)  # (B, N, X)
        corners = self._corners(outputs.grid, matched.device) * self.stride  # (N, 2)
        squares = torch.cat([corners, corners + self.stride], dim=1)  # (N, 4)
        for index, target in enumerate(targets):
            inside = inside_crowd(squares, target, CROWD_OVERLAP)  # (N,)
            if inside is not None:
                weights[index, inside & (matched[index] < 0)] = 0.0
        return weights.flatten(0, 1)

    def _encode(self, boxes: Tensor, cells: Tensor) -> Tensor:
        """Return what cells shall predict ``(..., 4)`` for boxes xyxy pixels: offsets in cells, roots of the sides."""
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2 / self.stride - cells  # (..., 2)
        side = (boxes[..., 2:] - boxes[..., :2]) / self._unit(boxes)  # (..., 2)
        return torch.cat([centre, side.sqrt()], dim=-1)  # (..., 4)

    def _decode(self, numbers: Tensor, cells: Tensor) -> Tensor:
        """Return boxes ``(..., 4)`` xyxy pixels, the inverse of ``_encode``; ``cells`` (..., 2) are their corners."""
        centre = (numbers[..., :2] + cells) * self.stride  # (..., 2)
        half = numbers[..., 2:].square() * self._unit(numbers) / 2  # (..., 2)
        return torch.cat([centre - half, centre + half], dim=-1)  # (..., 4)

    def _unit(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.image_size[1], self.image_size[0]])  # (2,) as width, height

    @staticmethod
    def _corners(grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return column and row of each cell ``(N, 2)`` float."""
        rows, columns = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1).reshape(-1, 2).float()


def _centre_side(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)  # (..., 4)


def _connected_head(channels: int, cells: int, numbers: int, *, hidden: int, dropout: float) -> nn.Sequential:
    """Return the paper's two fully connected layers, from ``(B, channels, S, S)`` to ``(B, S * S * numbers)``."""
    first, last = nn.Linear(channels * cells, hidden), nn.Linear(hidden, cells * numbers)
    return nn.Sequential(nn.Flatten(), first, nn.LeakyReLU(SLOPE, inplace=True), nn.Dropout(dropout), last)


def _convolved_head(channels: int, numbers: int) -> nn.Sequential:
    """Return a convolution and the predictions of each cell, from ``(B, channels, H, W)`` to ``(B, H, W, numbers)``."""
    return nn.Sequential(dark_convolution(channels, channels), nn.Conv2d(channels, numbers, 1), _ChannelsLast())


class _ChannelsLast(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1)  # (B, H, W, C)
