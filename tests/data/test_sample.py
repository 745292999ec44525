from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.data.sample import Sample, collate
from detseg.structures import Target


def sample(height: int, width: int, *, image_id: int = 0, truth: bool = False) -> Sample:
    target = Target(boxes=torch.tensor([[0.0, 0.0, 2.0, 3.0]]), labels=torch.tensor([1]), image_id=image_id)
    image = torch.full((3, height, width), 7 + image_id, dtype=torch.uint8)
    return Sample(image, target, target if truth else None)


def test_images_are_padded_right_and_below_to_the_divisor() -> None:
    batch = collate([sample(20, 40), sample(30, 10, image_id=1)], size_divisor=16)
    assert batch.images.shape == (2, 3, 32, 48) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[20, 40], [30, 10]]
    assert bool((batch.images[0, :, :20, :40] == 7).all()) and bool((batch.images[1, :, :30, :10] == 8).all())
    assert int(batch.images.sum()) == 3 * (20 * 40 * 7 + 30 * 10 * 8)  # so the padding is zero
    assert batch.truths is None


def test_pixel_major_images_keep_their_pixels() -> None:
    pixels = torch.arange(2 * 5 * 3, dtype=torch.uint8).reshape(2, 5, 3)
    batch = collate([sample(2, 5)._replace(image=pixels.permute(2, 0, 1))], size_divisor=1)
    assert_close(batch.images[0].permute(1, 2, 0), pixels)
    assert batch.images.is_contiguous()


def test_truths_are_for_all_or_none() -> None:
    batch = collate([sample(4, 4, truth=True), sample(4, 4, image_id=3, truth=True)])
    assert batch.truths is not None and [truth.image_id for truth in batch.truths] == [0, 3]
    with pytest.raises(ValueError, match="1 of 2 samples have a truth"):
        collate([sample(4, 4, truth=True), sample(4, 4)])
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
