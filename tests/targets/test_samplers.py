import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from detseg.targets.samplers import BalancedSampler, HardSampler


@pytest.mark.parametrize("size, fraction", [(16, 0.5), (64, 0.25), (1000, 0.5), (16, 0.0)])
def test_equals_torchvision_under_one_seed(size: int, fraction: float) -> None:
    labels = torch.randint(-1, 4, (200,), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(11)
    theirs = BalancedPositiveNegativeSampler(size, fraction)([labels])
    torch.manual_seed(11)
    ours = BalancedSampler(size=size, positive_fraction=fraction)(labels)
    for mine, mask in zip(ours, theirs, strict=True):
        assert_close(mine, mask[0].nonzero().flatten())


def test_numbers_and_kinds() -> None:
    labels = torch.tensor([1] * 30 + [0] * 100 + [-1] * 50)
    positive, background = BalancedSampler(size=40, positive_fraction=0.25)(labels)
    assert len(positive) == 10 and len(background) == 30
    assert (labels[positive] == 1).all() and (labels[background] == 0).all()
    assert len(background.unique()) == 30


def test_background_fills_missing_positives() -> None:
    positive, background = BalancedSampler(size=10, positive_fraction=0.5)(torch.tensor([1] + [0] * 50))
    assert (len(positive), len(background)) == (1, 9)


def test_nothing_to_draw() -> None:
    positive, background = BalancedSampler(size=10, positive_fraction=0.5)(torch.full((4,), -1))
    assert len(positive) == len(background) == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        BalancedSampler(size=0, positive_fraction=0.5)
    with pytest.raises(ValueError, match=r"positive_fraction 1\.5"):
        BalancedSampler(size=8, positive_fraction=1.5)


def test_the_hardest_without_their_doubles_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [50, 50, 60, 60], [80, 80, 90, 90]])
    losses = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.1])
    # Row 1 is the hardest; row 0 overlaps it by 0.8 and row 2 by 0.75.
    assert HardSampler(size=2).hardest(boxes, losses).tolist() == [1, 3]
    assert HardSampler(size=10).hardest(boxes, losses).tolist() == [1, 3, 4]
    assert HardSampler(size=3, threshold=0.76).hardest(boxes, losses).tolist() == [1, 2, 3]
    assert HardSampler(size=3, threshold=1.0).hardest(boxes, losses).tolist() == [0, 1, 2]
    assert HardSampler(size=3).hardest(boxes[:0], losses[:0]).shape == (0,)


def test_a_loss_that_is_not_finite_is_the_hardest() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    assert HardSampler(size=1).hardest(boxes, torch.tensor([5.0, float("nan"), 1.0])).tolist() == [1]
    assert HardSampler(size=1).hardest(boxes, torch.tensor([5.0, 2.0, float("inf")])).tolist() == [2]


def test_all_but_the_ignored_may_be_hard() -> None:
    positive, background = HardSampler(size=1)(torch.tensor([0, 1, -1, 3, 0]))
    assert positive.tolist() == [1, 3] and background.tolist() == [0, 4]
    with pytest.raises(ValueError, match="size is 0"):
        HardSampler(size=0)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        HardSampler(size=1, threshold=1.5)
