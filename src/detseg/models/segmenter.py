"""What all semantic segmenters share: truth stacked to a batch, named losses, and a map per image. No paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # torch's own convention
from torch import Tensor, nn

from detseg.losses.map_loss import MapLoss, SumOfLosses
from detseg.losses.segmentation import SegmentationLoss
from detseg.losses.separation import connected_regions, separation_weights
from detseg.models.inference import Inference
from detseg.structures import SemanticMap, Target

AnyMapLoss = SegmentationLoss | MapLoss | SumOfLosses
"""What gives the named terms of a map: a file of ``conf/segmentation_loss``."""


@dataclass
class SegmenterOutputs:
    """What a segmenter gives beside its logits.

    Attributes:
        logits: ``(B, K, H, W)`` at the size of the images.
        auxiliary: ``(B, K, h, w)``, logits of the auxiliary head at its own resolution; enlarged in the loss alone.
            ``None`` where a model has none.
        images: ``(B, 3, H, W)`` RGB in [0, 1] that the model saw; kept where ``SemanticSegmenter.inference`` is set.
    """

    logits: Tensor
    auxiliary: Tensor | None = None
    images: Tensor | None = None


Outputs = Tensor | SegmenterOutputs
"""Of a segmenter: the logits, and those of an auxiliary head where it has one."""


class SemanticSegmenter(nn.Module):
    """Base of the segmenters: ``forward`` is the paper's, ``loss`` and ``predict`` stand here.

    Args:
        num_classes: classes of the semantic map, a background included where the data has one.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map (10 in the paper), 0 for none; needs instance masks in the targets.
        regions: where a target has no instance masks, take the connected regions of each class but 0 for objects.
        auxiliary_weight: factor of the auxiliary head's terms, where a model has one.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
        regions: bool = False,
        auxiliary_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a segmenter needs at least 2 classes, got {num_classes}; count the background as one")
        self.num_classes = num_classes
        self.criterion: AnyMapLoss = SegmentationLoss() if loss is None else loss
        self.separation, self.regions = separation, regions
        self.auxiliary_weight = auxiliary_weight
        self.inference: Inference | None = None
        """How ``predict`` asks the model, if not just by its logits; may be set at any time. See ``Inference``."""
        self.register_forward_hook(_keep_images, with_kwargs=True)

    def loss(self, outputs: Outputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar terms; those of an auxiliary head are called ``loss_auxiliary_...``.

        Args:
            outputs: ``(B, K, H, W)`` logits, or with those of an auxiliary head.
            targets: one per image, with ``semantic`` maps of at most ``(H, W)``.

        Raises:
            ValueError: an image has no map, one that is too large, or a label that the model has no class for.
        """
        logits = logits_of(outputs)  # (B, K, H, W)
        labels = stack_labels(targets, logits, self.criterion.ignore_index)  # (B, H, W)
        weights = None  # (B, H, W)
        if self.separation:
            weights = stack_separation(targets, logits, self.separation, regions=self.regions)
        terms: dict[str, Tensor] = self.criterion(logits, labels, weights)
        if isinstance(outputs, SegmenterOutputs) and outputs.auxiliary is not None:
            early = resize_logits(outputs.auxiliary, (logits.shape[-2], logits.shape[-1]))  # (B, K, H, W)
            terms = terms | {
                key.replace("loss_", "loss_auxiliary_", 1): self.auxiliary_weight * value
                for key, value in self.criterion(early, labels, weights).items()
            }
        return terms

    def predict(self, outputs: Outputs, sizes: Tensor) -> list[SemanticMap]:
        """Return the likeliest class of each valid pixel, asked as ``inference`` says where it is set.

        Args:
            outputs: ``(B, K, H, W)`` logits, or with those of an auxiliary head, which is not read.
            sizes: ``(B, 2)`` int64, the valid height and width of each image.
        """
        if self.inference is not None and isinstance(outputs, SegmenterOutputs) and outputs.images is not None:
            return self._ask(self.inference, outputs.logits, outputs.images, sizes)
        labels = logits_of(outputs).argmax(dim=1)  # (B, H, W)
        return [
            SemanticMap(labels=image[:height, :width])
            for image, (height, width) in zip(labels, sizes.tolist(), strict=True)
        ]

    def predict_images(self, images: Tensor, sizes: Tensor) -> list[SemanticMap]:
        """Return what ``predict`` says of ``forward``, where no loss is wanted: by no pass that nobody reads.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1], padded at the right and the bottom.
            sizes: ``(B, 2)`` int64, the valid height and width of each image.
        """
        if self.inference is None or self.inference.plain:
            return self.predict(self(images, sizes), sizes)
        return self._ask(self.inference, None, images, sizes)

    @torch.no_grad()
    def _ask(self, inference: Inference, logits: Tensor | None, images: Tensor, sizes: Tensor) -> list[SemanticMap]:
        def ask(some: Tensor) -> Tensor:
            return logits_of(self(some))  # as a module: sharded weights are collected by its hooks

        return [SemanticMap(labels=found.argmax(0)) for found in inference(ask, logits, images, sizes)]


def _keep_images(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Outputs) -> Outputs | None:
    """Put the images beside the outputs where ``predict`` will need them; a forward hook."""
    if getattr(module, "inference", None) is None:
        return None
    images = args[0] if args else kwargs["images"]  # (B, 3, H, W)
    if isinstance(outputs, SegmenterOutputs):
        return replace(outputs, images=images)
    return SegmenterOutputs(outputs, images=images)


def logits_of(outputs: Outputs) -> Tensor:
    """Return the logits ``(B, K, H, W)`` at the size of the images."""
    return outputs.logits if isinstance(outputs, SegmenterOutputs) else outputs


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate logits ``(B, K, h, w)`` bilinearly to ``size``, height and width."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)  # (B, K, H, W)


def pad_to_multiple(images: Tensor, step: int, *, least: int = 0) -> Tensor:
    """Continue images by zeros at the right and the bottom.

    Args:
        images: ``(B, C, H, W)``, normalised, so that zero is what padding is everywhere.
        step: both sides become its multiples.
        least: and at least so long.

    Returns:
        ``(B, C, H', W')``.
    """
    height, width = (max(length, least) + -max(length, least) % step for length in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def stack_labels(targets: Sequence[Target], logits: Tensor, ignore_index: int) -> Tensor:
    """Stack the maps of a batch, padded at the right and the bottom with the ignore index.

    Args:
        targets: one per image.
        logits: ``(B, K, H, W)``, for the size, the device and the range of labels.
        ignore_index: what to pad with.

    Returns:
        ``(B, H, W)`` int64.

    Raises:
        ValueError: as of ``SemanticSegmenter.loss``.
    """
    count, classes, height, width = logits.shape
    labels = torch.full((count, height, width), ignore_index, dtype=torch.int64, device=logits.device)  # (B, H, W)
    for row, target in zip(labels, targets, strict=True):
        if target.semantic is None:
            raise ValueError(
                f"image {target.image_id} has no semantic map; set truth=semantic, and use data that has maps"
            )
        own = target.semantic.labels  # (h, w)
        if own.shape[0] > height or own.shape[1] > width:
            raise ValueError(
                f"image {target.image_id}: its map is {tuple(own.shape)}, but the logits are {(height, width)}"
            )
        row[: own.shape[0], : own.shape[1]] = own.where(own != target.semantic.ignore_index, ignore_index)
    if labels.device.type == "cpu" and bool((wrong := (labels >= classes) & (labels != ignore_index)).any()):
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0, 0])
        raise ValueError(
            f"image {targets[image].image_id} has label {int(labels[wrong][0])}, but the model has {classes} classes "
            f"(0..{classes - 1}, {ignore_index} is ignored); set num_classes to that of the data"
        )
    return labels


def stack_separation(targets: Sequence[Target], logits: Tensor, strength: float, *, regions: bool = False) -> Tensor:
    """Stack the weight maps of U-Net's equation 2, 1 in the padding.

    Args:
        targets: one per image, with instance masks.
        logits: ``(B, K, H, W)``, for the size and the device.
        strength: w0 of the paper.
        regions: where a target has no masks, take the connected regions of its map for objects.

    Returns:
        ``(B, H, W)`` float32.

    Raises:
        ValueError: an image with objects has no masks.
    """
    weights = torch.ones((len(targets), *logits.shape[-2:]), device=logits.device)  # (B, H, W)
    for row, target in zip(weights, targets, strict=True):
        masks = target.masks  # (N, h, w)
        if masks is None and regions and target.semantic is not None:
            masks = connected_regions(target.semantic.labels, ignore_index=target.semantic.ignore_index)
        if masks is None and len(target):
            raise ValueError(
                f"image {target.image_id} has no instance masks, which separation={strength} needs; "
                "set separation=0 or use data with masks"
            )
        if masks is not None and len(masks):
            row[: masks.shape[1], : masks.shape[2]] = separation_weights(masks, strength=strength)
    return weights
