"""The first layer of every model: from RGB in [0, 1] to what the backbone's weights were trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Subtract a mean, divide by a standard deviation, and set padding to zero.

    Both are persistent buffers, so they travel with the checkpoint and into an export.

    Args:
        mean: one number per channel, in the unit of the images ([0, 1]).
        std: one positive number per channel.

    Raises:
        ValueError: the lengths differ, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"Normalize: mean {list(mean)} and std {list(std)} need one number per channel, std > 0")
        self.register_buffer("mean", torch.tensor([float(value) for value in mean]))
        self.register_buffer("std", torch.tensor([float(value) for value in std]))

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalise a batch.

        Args:
            images: ``(B, C, H, W)`` float in [0, 1], padded at the right and the bottom.
            sizes: ``(B, 2)`` int64, the valid height and width of each image; ``None`` means all are whole.

        Returns:
            ``(B, C, H, W)`` float; zero outside the valid sizes.

        Raises:
            TypeError: the images are not floating point.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"Normalize: images are {images.dtype}, but a model takes floats in [0, 1]; use images.float() / 255"
            )
        images = (images - self.mean[:, None, None]) / self.std[:, None, None]  # (B, C, H, W)
        padding = None if sizes is None else padding_mask(sizes, (images.shape[-2], images.shape[-1]))
        return images if padding is None else images.masked_fill(padding[:, None], 0.0)


def padding_mask(sizes: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Return which pixels are padding, ``(B, H, W)`` bool, or ``None`` where none is (looked at on the CPU only).

    Args:
        sizes: ``(B, 2)`` int64, the valid height and width of each image.
        shape: (height, width) of the padded images.
    """
    if sizes.device.type == "cpu" and bool((sizes == torch.tensor(shape)).all()):
        return None
    rows = torch.arange(shape[0], device=sizes.device)[None] >= sizes[:, :1]  # (B, H)
    columns = torch.arange(shape[1], device=sizes.device)[None] >= sizes[:, 1:]  # (B, W)
    return rows[:, :, None] | columns[:, None, :]  # (B, H, W)
