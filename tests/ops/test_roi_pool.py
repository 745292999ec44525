import pytest
import torch
import torchvision
from torch.testing import assert_close

from detseg.ops import roi_pool as module
from detseg.ops.roi_pool import roi_pool


def drawn(count: int, images: int, low: float, high: float) -> torch.Tensor:
    """Regions whose corners lie on quarters of a pixel, so that halves of a cell occur."""
    corners = (low + torch.rand(count, 2, 2) * (high - low)).mul(4).round().div(4).sort(dim=1).values.flatten(1)
    return torch.cat([torch.randint(images, (count, 1)).float(), corners], dim=1)


def by_table(feature: torch.Tensor, regions: torch.Tensor, size: int, scale: float) -> torch.Tensor:
    windows = module._Windows(feature, regions, size, scale)
    return windows.pool(feature)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 128.0), (-40.0, 170.0), (60.0, 66.0)])
def test_the_table_equals_torchvision_bit_for_bit(size: int, stride: int, low: float, high: float) -> None:
    feature = torch.randn(2, 5, 128 // stride, 96 // stride)
    regions = drawn(80, 2, low, high)
    expected = torchvision.ops.roi_pool(feature, regions, size, 1 / stride)
    assert torch.equal(by_table(feature, regions, size, 1 / stride), expected)
    assert torch.equal(roi_pool(feature, regions, 1 / stride, output_size=size), expected)


def test_halves_are_rounded_away_from_zero_and_the_float_below_a_half_is_not_rounded_up() -> None:
    below = 0.49999997
    regions = torch.tensor([[0, 0.5, 0.5, 1.5, 2.5], [0, below, below, 3, 3], [0, -0.5, -1.5, 2.5, 3.5]])
    feature = torch.arange(36.0).view(1, 1, 6, 6)
    expected = torchvision.ops.roi_pool(feature, regions, 2, 1.0)
    assert torch.equal(by_table(feature, regions, 2, 1.0), expected)
    assert by_table(feature, regions[:1], 2, 1.0).tolist() == [[[[13, 14], [19, 20]]]]  # cells 1..2 x 1..3, rows shared


def test_a_region_outside_the_map_is_zero() -> None:
    feature = torch.ones(1, 3, 4, 4)
    regions = torch.tensor([[0, 200.0, 200, 240, 240], [0, -90.0, -90, -70, -70]])
    assert roi_pool(feature, regions, 1 / 8, output_size=7).abs().sum() == 0
    assert by_table(feature, regions, 7, 1 / 8).shape == (2, 3, 7, 7)


def test_many_small_regions_are_looked_up_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    whole = module._Windows.pool
    monkeypatch.setattr(module._Windows, "pool", lambda self, f: looked.append(len(self.image)) or whole(self, f))
    feature, many = torch.randn(1, 4, 16, 16), drawn(300, 1, 0, 128)
    roi_pool(feature, many, 1 / 8, output_size=7)
    assert looked == [300]
    roi_pool(feature, many[:3], 1 / 8, output_size=7)
    roi_pool(feature.requires_grad_(), many, 1 / 8, output_size=7)
    assert looked == [300]
    with torch.no_grad():
        roi_pool(feature, many, 1 / 8, output_size=7)
    assert looked == [300, 300]


def test_gradients_are_those_of_torchvision() -> None:
    feature = torch.randn(1, 4, 16, 16, requires_grad=True)
    regions = drawn(50, 1, 0, 128)
    (gradient,) = torch.autograd.grad(roi_pool(feature, regions, 1 / 8, output_size=7).square().sum(), feature)
    theirs = torchvision.ops.roi_pool(feature, regions, 7, 1 / 8).square().sum()
    assert_close(gradient, torch.autograd.grad(theirs, feature)[0])


def test_no_region_has_no_features() -> None:
    assert roi_pool(torch.randn(1, 4, 8, 8), torch.zeros(0, 5), 1 / 8, output_size=7).shape == (0, 4, 7, 7)
