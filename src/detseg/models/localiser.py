"""Classification and localisation of one object: the step between classifying an image and detecting in it.

Simonyan & Zisserman 2014, `"Very Deep Convolutional Networks for Large-Scale Image Recognition"
<https://arxiv.org/abs/1409.1556>`_, appendix A, after `"OverFeat" <https://arxiv.org/abs/1312.6229>`_, section 4.

Built: a backbone, its last map pooled to a few cells, fully connected layers, and two outputs: a softmax over the
classes, and one box for all of them as four numbers (appendix A's "single-class regression") that learn by squared
differences. Differs from the paper: class and box share one network and learn together; background is a class, so that
an image may be empty; the box counts in shares of the image; no merging of boxes from several crops. Of several objects
the largest is learnt, as an image has one answer.

Letters: B images, E of them with an object, K classes, C channels, P cells of a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detseg.losses.box_loss import BoxLoss, is_of_boxes
from detseg.losses.normalise import normaliser
from detseg.losses.squared import SquaredError
from detseg.models.box_branch import RegionHead, TwoLayerHead
from detseg.nn.backbone import Backbone
from detseg.nn.normalize import Normalize
from detseg.ops.boxes import box_iou, clip_boxes
from detseg.structures import Detections, Target
from detseg.targets.crowds import learnable


@dataclass
class LocaliserOutputs:
    """What the network says about each image.

    Attributes:
        logits: ``(B, K + 1)``, background first.
        boxes: ``(B, 4)``, centre x and y, width and height as shares of the padded image.
        image_size: (height, width) of the padded images.
    """

    logits: Tensor
    boxes: Tensor
    image_size: tuple[int, int]


class Localiser(nn.Module):
    """One class and one box per image.

    Args:
        num_classes: K foreground classes.
        backbone: its last map is looked at.
        head: makes the layers between the pooled map and the outputs from the map's ``shape`` (C, P, P); default two
            fully connected layers.
        pool: P: the last map is averaged to so many cells a side, which keeps where things are.
        box_loss: of the four numbers, summed over images; default squared differences; ``SmoothL1`` is gentler.
        box_weight: factor of the box loss beside the classification's.
        score_threshold: detections must score higher, in [0, 1).

    Raises:
        ValueError: ``box_loss`` is one of boxes, such as IoU's.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        head: Callable[..., RegionHead] = TwoLayerHead,
        pool: int = 7,
        box_loss: BoxLoss | None = None,
        box_weight: float = 1.0,
        score_threshold: float = 0.05,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.head = head(shape=(backbone.channels[-1], pool, pool))
        self.classifier = nn.Linear(self.head.out_features, num_classes + 1)
        self.localiser = nn.Linear(self.head.out_features, 4)
        self.box_loss = box_loss or SquaredError()
        if is_of_boxes(self.box_loss):
            raise ValueError(
                f"Localiser: {type(self.box_loss).__name__} compares boxes, and what is learnt here are four shares of "
                "the image (centre and sides); take detseg.losses.SquaredError or SmoothL1"
            )
        self.box_weight = box_weight
        self.score_threshold = score_threshold

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None
    ) -> LocaliserOutputs:
        """Run the network on ``(B, 3, H, W)`` RGB in [0, 1]; ``targets`` are not read. See ``Detector.forward``."""
        features = self.pool(self.backbone(self.normalize(images, sizes))[-1])  # (B, C, P, P)
        hidden = self.head(features)  # (B, D)
        return LocaliserOutputs(
            self.classifier(hidden), self.localiser(hidden), image_size=(images.shape[2], images.shape[3])
        )

    def loss(self, outputs: LocaliserOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return ``loss_classification`` and ``loss_box``; an image without objects learns background and no box."""
        largest = [largest_object(target) for target in targets]
        image = torch.tensor([row for row, one in enumerate(largest) if len(one)], dtype=torch.int64)  # (E,)
        image = image.to(outputs.logits.device)
        wanted = torch.zeros(len(targets), dtype=torch.int64, device=image.device)  # (B,) background
        wanted[image] = torch.cat([one.labels for one in largest]) + 1
        logits = outputs.logits.float()  # (B, K + 1)
        classes = F.cross_entropy(logits, wanted, reduction="sum") / normaliser(torch.ones_like(wanted).sum())
        truth = to_shares(torch.cat([one.boxes for one in largest]), outputs.image_size)  # (E, 4)
        boxes = self.box_loss(outputs.boxes[image].float(), truth.to(outputs.boxes.device).float())
        count = normaliser(torch.ones_like(image).sum())
        return {"loss_classification": classes, "loss_box": self.box_weight * boxes / count}

    @torch.no_grad()
    def predict(self, outputs: LocaliserOutputs, sizes: Tensor) -> list[Detections]:
        """Return at most one detection per image, scored by its class probability; see ``Detector.predict``."""
        probability = outputs.logits.float().softmax(dim=1)[:, 1:]  # (B, K)
        score, label = probability.max(dim=1)  # (B,) each
        boxes = from_shares(outputs.boxes.float(), outputs.image_size)  # (B, 4)
        boxes = clip_boxes(boxes[:, None], sizes)  # (B, 1, 4)
        found = [Detections(box, score[row, None], label[row, None]) for row, box in enumerate(boxes)]
        return [one[one.scores > self.score_threshold] for one in found]

    @torch.no_grad()
    def diagnostics(self, outputs: LocaliserOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return ILSVRC's two accuracies with one guess per image, scalars in [0, 1].

        ``classified`` is the share of images whose likeliest class is that of some object in them (of background where
        they have none), ``localised`` that where its box also has an IoU of 0.5 with an object of the class.
        """
        classified, localised = [], []
        guesses = outputs.logits.argmax(dim=1).cpu()  # (B,) 0 is background
        boxes = from_shares(outputs.boxes.float(), outputs.image_size).cpu()  # (B, 4)
        for guess, box, target in zip(guesses, boxes, targets, strict=True):
            objects = learnable(target)
            rows = (objects.labels.cpu() == guess - 1).nonzero().flatten()  # (n,) objects of the class
            empty = len(objects) == 0 and int(guess) == 0
            classified.append(empty or len(rows) > 0)
            localised.append(empty or bool((box_iou(box[None], objects.boxes.cpu()[rows]) >= 0.5).any()))
        return {
            name: outputs.logits.new_tensor(right).mean()
            for name, right in {"classified": classified, "localised": localised}.items()
        }


def largest_object(target: Target) -> Target:
    """Return the object with the largest box, of equal ones the first; none where there is none to learn from."""
    objects = learnable(target)
    if len(objects) < 2:
        return objects
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]  # (N, 2)
    best = sides.prod(dim=1).argmax()
    return objects[best[None]]


def to_shares(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return centre and size ``(..., 4)`` as shares of an image of (height, width) ``size`` of xyxy pixel boxes."""
    unit = boxes.new_tensor([size[1], size[0]])  # (2,) as width, height
    low, high = boxes[..., :2] / unit, boxes[..., 2:] / unit  # (..., 2) each
    return torch.cat([(low + high) / 2, high - low], dim=-1)  # (..., 4)


def from_shares(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """Return xyxy pixel boxes ``(..., 4)``, the inverse of ``to_shares``; a negative side counts as none."""
    unit = shares.new_tensor([size[1], size[0]])  # (2,) as width, height
    centre, half = shares[..., :2], shares[..., 2:].clamp(min=0) / 2  # (..., 2) each
    return torch.cat([(centre - half) * unit, (centre + half) * unit], dim=-1)  # (..., 4)
