"""What all semantic segmenters share: truth stacked to a batch, named losses, and a map per image. No paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detseg.losses.segmentation import SegmentationLoss
from detseg.losses.separation import separation_weights
from detseg.structures import SemanticMap, Target


class SemanticSegmenter(nn.Module):
    """Base of the segmenters: ``forward`` is the paper's, ``loss`` and ``predict`` stand here.

    Args:
        num_classes: classes of the semantic map, a background included where the data has one.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map (10 in the paper), 0 for none; needs instance masks in the targets.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, *, num_classes: int, loss: SegmentationLoss | None = None, separation: float = 0.0) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a segmenter needs at least 2 classes, got {num_classes}; count the background as one")
        self.num_classes = num_classes
        self.criterion = SegmentationLoss() if loss is None else loss
        self.separation = separation

    def loss(self, outputs: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar terms.

        Args:
            outputs: ``(B, K, H, W)`` logits.
            targets: one per image, with ``semantic`` maps of at most ``(H, W)``.

        Raises:
            ValueError: an image has no map, one that is too large, or a label that the model has no class for.
        """
        labels = stack_labels(targets, outputs, self.criterion.ignore_index)  # (B, H, W)
        weights = stack_separation(targets, outputs, self.separation) if self.separation else None  # (B, H, W)
        terms: dict[str, Tensor] = self.criterion(outputs, labels, weights)
        return terms

    def predict(self, outputs: Tensor, sizes: Tensor) -> list[SemanticMap]:
        """Return the likeliest class of each valid pixel.

        Args:
            outputs: ``(B, K, H, W)`` logits.
            sizes: ``(B, 2)`` int64, the valid height and width of each image.
        """
        labels = outputs.argmax(dim=1)  # (B, H, W)
        return [
            SemanticMap(labels=image[:height, :width])
            for image, (height, width) in zip(labels, sizes.tolist(), strict=True)
        ]


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


def stack_separation(targets: Sequence[Target], logits: Tensor, strength: float) -> Tensor:
    """Stack the weight maps of U-Net's equation 2, 1 in the padding.

    Args:
        targets: one per image, with instance masks.
        logits: ``(B, K, H, W)``, for the size and the device.
        strength: w0 of the paper.

    Returns:
        ``(B, H, W)`` float32.

    Raises:
        ValueError: an image with objects has no masks.
    """
    weights = torch.ones((len(targets), *logits.shape[-2:]), device=logits.device)  # (B, H, W)
    for row, target in zip(weights, targets, strict=True):
        if target.masks is None and len(target):
            raise ValueError(
                f"image {target.image_id} has no instance masks, which separation={strength} needs; "
                "set separation=0 or use data with masks"
            )
        if target.masks is not None and len(target):
            row[: target.masks.shape[1], : target.masks.shape[2]] = separation_weights(target.masks, strength=strength)
    return weights
