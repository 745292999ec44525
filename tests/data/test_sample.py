from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.data.sample import Sample, collate, empty_batch
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


def test_proposals_move_into_the_batch_of_all_or_none() -> None:
    proposed = [sample(4, 4), sample(4, 4, image_id=1)]
    for number, one in enumerate(proposed):
        one.target.proposals = torch.ones((2 * number, 4))  # the first image has none
    batch = collate(proposed)
    assert batch.proposals is not None and [boxes.shape for boxes in batch.proposals] == [(0, 4), (2, 4)]
    assert [target.proposals for target in batch.targets] == [None, None]
    assert proposed[1].target.proposals is not None  # the sample stays as it was
    assert collate([sample(4, 4)]).proposals is None
    with pytest.raises(ValueError, match="2 of 3 samples have proposals"):
        collate([*proposed, sample(4, 4)])


def test_a_batch_without_images_has_proposals_where_the_others_have() -> None:
    assert empty_batch().proposals is None
    assert empty_batch(64, proposals=True).proposals == [] and len(empty_batch(64, proposals=True)) == 0
