"""Detections of one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from detseg.structures.base import TensorFields, check_boxes, check_labels, check_masks, check_rows


@dataclass
class Detections(TensorFields):
    """Boxes that a model found in one image, best first; slicing filters: ``found[found.scores > 0.5]``.

    Attributes:
        boxes: ``(N, 4)`` float, xyxy in pixels.
        scores: ``(N,)`` float in [0, 1].
        labels: ``(N,)`` int64, foreground classes 0..K-1.
        masks: ``(N, H, W)`` bool at the size of the image, or ``None`` where the model gives boxes alone.

    Raises:
        ValueError: shapes disagree, a coordinate or score is not finite, a label is negative.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        check_boxes("Detections", self.boxes)
        check_rows("Detections", len(self.boxes), scores=self.scores, labels=self.labels, masks=self.masks)
        check_labels("Detections", self.labels)
        check_masks("Detections", self.masks)
        if self.scores.ndim != 1 or not self.scores.is_floating_point():
            raise ValueError(
                f"Detections: scores must be (N,) floats, got {tuple(self.scores.shape)} {self.scores.dtype}"
            )
        if self.scores.device.type == "cpu" and not bool(self.scores.isfinite().all()):
            row = int((~self.scores.isfinite()).nonzero()[0, 0])
            raise ValueError(f"Detections: score {row} is {float(self.scores[row])}; every score must be finite")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice | int | list[int]) -> Self:
        """Select detections by a bool mask, indices, a slice or one number; always returns ``Detections``."""
        if isinstance(index, int):
            size = len(self)
            if not -size <= index < size:
                raise IndexError(f"detection {index} was asked for, but there are {size}")
            index = [index]
        if isinstance(index, list):
            index = torch.as_tensor(index, dtype=torch.int64, device=self.boxes.device)
        masks = None if self.masks is None else self.masks[index]
        return replace(self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index], masks=masks)

    @classmethod
    def empty(cls, *, device: torch.device | str = "cpu", mask_size: tuple[int, int] | None = None) -> Detections:
        """Return no detections; with ``mask_size`` (h, w) they carry ``(0, h, w)`` masks."""
        masks = None if mask_size is None else torch.zeros((0, *mask_size), dtype=torch.bool, device=device)
        return Detections(
            boxes=torch.zeros((0, 4), device=device),
            scores=torch.zeros(0, device=device),
            labels=torch.zeros(0, dtype=torch.int64, device=device),
            masks=masks,
        )

    def resize(self, source: tuple[int, int], size: tuple[int, int]) -> Self:
        """Return the detections in the pixels of an image of another size.

        Args:
            source: (height, width) that the boxes are in now.
            size: (height, width) wanted, for instance the photo's own.
        """
        if source == size:
            return self
        scale = self.boxes.new_tensor([size[1] / source[1], size[0] / source[0]]).repeat(2)
        masks = self.masks
        if masks is not None:
            cropped = masks[:, : source[0], : source[1]].float()[:, None]
            grown = torch.nn.functional.interpolate(cropped, size=size, mode="bilinear", align_corners=False)
            masks = grown[:, 0] > 0.5
        return replace(self, boxes=self.boxes * scale, masks=masks)
