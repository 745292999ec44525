from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.data.sample import Sample, SampleDataset
from detseg.data.split import TransformedSplit, seeded
from detseg.structures import Target


class Numbered(SampleDataset):
    class_names = ("a",)
    category_ids = (1,)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        target = Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64), image_id=index)
        return Sample(torch.full((3, 2, 2), index, dtype=torch.uint8), target)


def jitter(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    return image.float() + torch.rand(()), target


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    split = TransformedSplit(samples=Numbered(), transform=jitter, seed=5)
    first = split[(2, 1)].image
    torch.rand(7)  # what others draw does not matter
    assert_close(split[(2, 1)].image, first, rtol=0, atol=0)
    others = [
        split[(3, 1)].image,
        split[(2, 2)].image - 1,
        TransformedSplit(samples=Numbered(), transform=jitter)[(2, 1)].image,
    ]
    assert all(not torch.equal(other, first) for other in others)
    assert_close(split[1].image, split[(0, 1)].image, rtol=0, atol=0)  # a bare index is epoch 0


def test_the_global_random_numbers_go_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(9)
    expected = torch.rand(4)
    torch.manual_seed(9)
    start = torch.rand(2)
    with seeded(1, 2, 3):
        inside = torch.rand(2)
    assert_close(torch.cat([start, torch.rand(2)]), expected)
    with seeded(1, 2, 3):
        assert_close(torch.rand(2), inside)


def test_truth_is_the_untransformed_target() -> None:
    sample = TransformedSplit(samples=Numbered(), transform=lambda image, target: (image, target[:0]), with_truth=True)[
        2
    ]
    assert sample.truth is not None and sample.truth.image_id == 2 and sample.truth is not sample.target
    assert TransformedSplit(samples=Numbered(), transform=None)[0].truth is None
