import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from detseg.targets.samplers import BalancedSampler


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
