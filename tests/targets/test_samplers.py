import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from detseg.targets.samplers import BalancedSampler, HardNegativeMining, HardSampler


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


def mined_slowly(losses: torch.Tensor, matched: torch.Tensor, ratio: float, least: int) -> list[list[int]]:
    """Image by image, background by background."""
    found = []
    for row, match in zip(losses.tolist(), matched.tolist(), strict=True):
        background = [index for index, value in enumerate(match) if value == -1]
        wanted = max(ratio * sum(value >= 0 for value in match), least)
        hardest = sorted(background, key=lambda index: -row[index])  # stable
        found.append(sorted(index for rank, index in enumerate(hardest) if rank < wanted))
    return found


@pytest.mark.parametrize("ratio, least", [(3.0, 0), (0.5, 4), (1.5, 0), (1000.0, 0), (0.0, 7)])
def test_mined_background_is_that_of_a_slow_twin(ratio: float, least: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for positives in (0.0, 0.02, 0.9):
        draw = torch.rand((4, 60), generator=generator)
        matched = torch.where(draw < positives, 3, torch.where(draw > 0.9, -2, -1))
        losses = (torch.rand((4, 60), generator=generator) * 8).round()  # many are equal
        found = HardNegativeMining(ratio=ratio, least=least)(losses, matched)
        assert [row.nonzero().flatten().tolist() for row in found] == mined_slowly(losses, matched, ratio, least)


def test_mining_by_hand() -> None:
    losses = torch.tensor([[9.0, 1, 5, 3, 4, 8], [7, 6, 5, 4, 3, 2]])
    matched = torch.tensor([[0, -1, -1, -1, -1, -2], [-1] * 6])
    one = HardNegativeMining(ratio=2.0)(losses, matched)
    assert one.tolist() == [[False, False, True, False, True, False], [False] * 6]
    least = HardNegativeMining(ratio=2.0, least=1)(losses, matched)
    assert least[0].tolist() == one[0].tolist() and least[1].tolist() == [True] + [False] * 5
    losses[0, 1] = torch.nan
    assert HardNegativeMining(ratio=1.0)(losses, matched)[0].nonzero().flatten().tolist() == [1]


def test_mining_that_learns_no_background_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio is 0\.0 and least 0"):
        HardNegativeMining(ratio=0.0)
    with pytest.raises(ValueError, match=r"ratio is -1\.0"):
        HardNegativeMining(ratio=-1.0, least=3)
