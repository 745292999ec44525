"""A batch as it travels from the loader to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detseg.structures.base import TensorFields, check_boxes
from detseg.structures.target import Target


@dataclass
class Batch(TensorFields):
    """Images padded to one size, with their truth.

    Attributes:
        images: ``(B, 3, H, W)`` RGB; uint8 from the loader, float in [0, 1] once on the device. Padding is at the
            right and the bottom.
        sizes: ``(B, 2)`` int64, the valid height and width of each image.
        targets: one per image, in the pixels of ``images``.
        truths: in evaluation, one per image in the photo's own pixels, as the files have it; metrics count against
            these. ``None`` in training.
        proposals: one ``(P, 4)`` float per image, xyxy in the pixels of ``images``; ``None`` where none were made.

    Raises:
        ValueError: the numbers of images, sizes, targets and proposals disagree, proposals are no boxes, or a size
            exceeds the padded images.
    """

    images: Tensor
    sizes: Tensor
    targets: list[Target]
    truths: list[Target] | None = None
    proposals: list[Tensor] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"Batch: images must be (B, 3, H, W), got {tuple(self.images.shape)}")
        count = len(self.images)
        lists = {"targets": self.targets, "truths": self.truths, "proposals": self.proposals}
        for name, values in lists.items():
            if isinstance(values, list) and len(values) != count:
                raise ValueError(f"Batch: {count} images but {len(values)} {name}")
        for row, boxes in enumerate(self.proposals or []):
            check_boxes(f"Batch, proposals of image {row}", boxes)
        if self.sizes.shape != (count, 2) or self.sizes.dtype != torch.int64:
            raise ValueError(
                f"Batch: sizes must be ({count}, 2) int64, got {tuple(self.sizes.shape)} {self.sizes.dtype}"
            )
        if self.sizes.device.type == "cpu" and bool((self.sizes > torch.tensor(self.images.shape[-2:])).any()):
            raise ValueError(f"Batch: sizes {self.sizes.tolist()} exceed the images' {tuple(self.images.shape[-2:])}")

    def __len__(self) -> int:
        return len(self.images)
