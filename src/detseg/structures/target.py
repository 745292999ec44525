"""The truth about one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from detseg.structures.base import TensorFields, check_boxes, check_labels, check_masks, check_rows
from detseg.structures.maps import PanopticMap, SemanticMap


@dataclass
class Target(TensorFields):
    """Objects, and where the data has them maps, of one image.

    Attributes:
        boxes: ``(N, 4)`` float, xyxy in pixels of the image as the model sees it.
        labels: ``(N,)`` int64, foreground classes 0..K-1.
        masks: ``(N, H, W)`` bool at ``size``, or ``None`` where only boxes are known.
        iscrowd: ``(N,)`` bool; a crowd region is never trained on and never counts as missed. Default: none is.
        area: ``(N,)`` float in square pixels, by which COCO sorts objects into small, medium and large.
            Default: the mask's area, else the box's.
        image_id: the data set's own id of the image.
        size: (height, width) of the valid image; default (0, 0) means unknown.
        difficult: ``(N,)`` bool, VOC's flag: such an object is neither rewarded nor missed. Default: none is.
        semantic: the class of each pixel, or ``None``.
        panoptic: the segment of each pixel, or ``None``.
        file: where the image came from, for messages; may be empty.
        proposals: ``(P, 4)`` float, xyxy in the same pixels: regions in which an object may lie, made before the model
            runs. No truth, and no rows of objects: selecting objects leaves them whole. ``None``: none were made.

    Raises:
        ValueError: shapes disagree, a coordinate is not finite, or a label is negative; the message names the image.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    iscrowd: Tensor = None  # type: ignore[assignment]  # never None after __post_init__
    area: Tensor = None  # type: ignore[assignment]  # never None after __post_init__
    image_id: int = 0
    size: tuple[int, int] = (0, 0)
    difficult: Tensor = None  # type: ignore[assignment]  # never None after __post_init__
    semantic: SemanticMap | None = None
    panoptic: PanopticMap | None = None
    file: str = ""
    proposals: Tensor | None = None

    def __post_init__(self) -> None:
        owner = f"Target of image {self.image_id}" + (f" ({self.file})" if self.file else "")
        check_boxes(owner, self.boxes)
        count, device = len(self.boxes), self.boxes.device
        if self.iscrowd is None:
            self.iscrowd = torch.zeros(count, dtype=torch.bool, device=device)
        if self.difficult is None:
            self.difficult = torch.zeros(count, dtype=torch.bool, device=device)
        if self.area is None:
            self.area = _areas(self.boxes, self.masks)
        check_rows(
            owner,
            count,
            labels=self.labels,
            masks=self.masks,
            iscrowd=self.iscrowd,
            area=self.area,
            difficult=self.difficult,
        )
        check_labels(owner, self.labels)
        check_masks(owner, self.masks)
        if self.proposals is not None:
            check_boxes(f"{owner}, proposals", self.proposals)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Select objects by a bool mask, indices or a slice; the maps and the proposals stay whole."""
        return replace(
            self,
            boxes=self.boxes[index],
            labels=self.labels[index],
            masks=None if self.masks is None else self.masks[index],
            iscrowd=self.iscrowd[index],
            area=self.area[index],
            difficult=self.difficult[index],
        )

    def trainable(self) -> Self:
        """Return the target without crowd regions, which no detector learns from."""
        return self[~self.iscrowd] if bool(self.iscrowd.any()) else self


def _areas(boxes: Tensor, masks: Tensor | None) -> Tensor:
    if masks is not None and masks.ndim == 3:
        return masks.flatten(1).sum(dim=1).to(boxes.dtype)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
