import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import Matcher

from detseg.targets.matchers import BELOW, BETWEEN, IoUMatcher


@pytest.mark.parametrize("allow_low_quality", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_equals_torchvision(seed: int, allow_low_quality: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(6, 80, generator=generator).mul(20).round().div(20)  # rounded: many ties
    theirs = Matcher(0.7, 0.3, allow_low_quality)(iou.clone())
    ours = IoUMatcher(positive=0.7, negative=0.3, allow_low_quality=allow_low_quality)(iou)
    assert_close(ours, theirs)


def test_by_hand() -> None:
    iou = torch.tensor([[0.9, 0.4, 0.1, 0.0], [0.2, 0.5, 0.2, 0.0]])
    strict = IoUMatcher(positive=0.7, negative=0.3, allow_low_quality=False)
    assert strict(iou).tolist() == [0, BETWEEN, BELOW, BELOW]
    rescued = IoUMatcher(positive=0.7, negative=0.3, allow_low_quality=True)
    assert rescued(iou).tolist() == [0, 1, BELOW, BELOW]


def test_no_objects_means_all_background() -> None:
    found = IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=True)(torch.zeros(0, 3))
    assert found.tolist() == [BELOW] * 3
    assert found.dtype == torch.int64


def test_no_anchors() -> None:
    assert IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=True)(torch.zeros(2, 0)).shape == (0,)


def test_object_that_nothing_touches_makes_nothing_positive() -> None:
    iou = torch.tensor([[0.0, 0.0, 0.0], [0.8, 0.1, 0.0]])
    assert IoUMatcher(positive=0.7, negative=0.3, allow_low_quality=True)(iou).tolist() == [1, BELOW, BELOW]


def test_thresholds_out_of_order_are_named() -> None:
    with pytest.raises(ValueError, match=r"negative 0\.6 and positive 0\.5"):
        IoUMatcher(positive=0.5, negative=0.6, allow_low_quality=False)


def test_lowest_ignores_what_lies_far_from_every_object() -> None:
    iou = torch.tensor([[0.6, 0.3, 0.1, 0.09, 0.0]])
    matcher = IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=False, lowest=0.1)
    assert matcher(iou).tolist() == [0, BELOW, BELOW, BETWEEN, BETWEEN]
    assert matcher(torch.zeros(0, 2)).tolist() == [BELOW, BELOW]
    with pytest.raises(ValueError, match=r"lowest is 0\.6, negative 0\.5"):
        IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=False, lowest=0.6)
