"""One image with its truth, and how images become a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detseg.structures import Batch, Target


class Sample(NamedTuple):
    """An image with its truth.

    Attributes:
        image: ``(3, H, W)`` uint8 RGB, as a ``tv_tensors.Image`` or a plain tensor.
        target: the truth in the pixels of ``image``.
        truth: in evaluation, the truth in the photo's own pixels; ``None`` in training.
    """

    image: Tensor
    target: Target
    truth: Target | None = None


class SampleDataset(Dataset[Sample], ABC):
    """What a split must offer to :class:`~detseg.data.module.DetectionData`: untransformed samples.

    Attributes:
        class_names: one name per label 0..K-1.
        category_ids: the data set's own id of each label, as a predictions file must carry them.
    """

    class_names: Sequence[str]
    category_ids: Sequence[int]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return image ``index`` as it is in the files: own pixels, no augmentation, ``truth`` left ``None``."""

    def file_of(self, index: int) -> str:
        """Return where image ``index`` comes from, for messages; nothing where that is no file."""
        return ""

    def identity(self, index: int) -> str:
        """Return what changes whenever the pixels of image ``index`` do, without decoding; empty: nothing tells."""
        return ""

    def prepare(self) -> None:
        """Do what pays before workers start, such as decoding images once; called in the main process."""


def collate(samples: Sequence[Sample], size_divisor: int = 32) -> Batch:
    """Pad images at the right and the bottom to one size and stack them.

    Args:
        samples: at least one; either all or none of them have a ``truth``, and likewise proposals in their targets.
        size_divisor: the padded height and width are multiples of this many pixels, the coarsest stride of a pyramid.

    Returns:
        A batch with uint8 images ``(B, 3, H, W)``; targets, their masks and maps are not padded. Proposals move from
        the targets into the batch.

    Raises:
        ValueError: no samples, or only some have a ``truth`` or proposals.
    """
    if not samples:
        raise ValueError("collate: a batch needs at least one sample, got none")
    heights_widths = [(sample.image.shape[-2], sample.image.shape[-1]) for sample in samples]
    height, width = (-(-max(side) // size_divisor) * size_divisor for side in zip(*heights_widths, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)  # (B, 3, H, W)
    for row, sample in enumerate(samples):
        h, w = heights_widths[row]
        images[row, :, :h, :w] = sample.image.as_subclass(Tensor)
    truths = [sample.truth for sample in samples if sample.truth is not None]
    proposals = [sample.target.proposals for sample in samples if sample.target.proposals is not None]
    for kind, number in {"a truth": len(truths), "proposals": len(proposals)}.items():
        if number not in (0, len(samples)):
            raise ValueError(f"collate: {number} of {len(samples)} samples have {kind}; give it for all or for none")
    return Batch(
        images=images,
        sizes=torch.tensor(heights_widths, dtype=torch.int64),  # (B, 2)
        targets=[replace(sample.target, proposals=None) if proposals else sample.target for sample in samples],
        truths=truths or None,
        proposals=proposals or None,
    )


def empty_batch(side: int = 32, *, proposals: bool = False) -> Batch:
    """Return a batch without images, for a process that has none to evaluate.

    Args:
        side: its height and width in pixels.
        proposals: whether the other batches have proposals.
    """
    images = torch.zeros((0, 3, side, side), dtype=torch.uint8)  # (0, 3, H, W)
    sizes = torch.zeros((0, 2), dtype=torch.int64)
    return Batch(images=images, sizes=sizes, targets=[], truths=[], proposals=[] if proposals else None)
