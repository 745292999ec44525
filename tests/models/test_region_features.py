import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import MultiScaleRoIAlign

from detseg.models.region_features import RegionAlign, stack_regions


def boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 200
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) ** 2 * 400], dim=1).clamp(max=256)


def test_equals_torchvision_on_a_pyramid() -> None:
    features = [torch.randn(2, 4, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32, 64)]
    regions = [boxes(40), boxes(25)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = theirs({str(i): f for i, f in enumerate(features)}, regions, [(256, 256)] * 2)
    ours = RegionAlign(output_size=7, sampling_ratio=2)
    assert_close(ours(features, stack_regions(regions), [4, 8, 16, 32, 64]), expected, rtol=1e-4, atol=1e-5)


def test_levels_by_hand() -> None:
    # FPN, equation 1: 224 px reads level 4 (stride 16); each halving reads one level finer.
    sides = torch.tensor([20.0, 56, 111, 112, 224, 448, 2000])
    squares = torch.cat([torch.zeros(7, 2), sides[:, None].repeat(1, 2)], dim=1)
    assert RegionAlign().assign(squares, [4, 8, 16, 32, 64]).tolist() == [0, 0, 0, 1, 2, 3, 3]
    small = RegionAlign(levels=2, canonical_size=64.0, canonical_level=4)
    assert small.assign(squares, [8, 16]).tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_flat_region_reads_the_finest_level() -> None:
    assert RegionAlign().assign(torch.tensor([[5.0, 5, 5, 9]]), [4, 8, 16, 32]).tolist() == [0]


def test_stacked_regions_carry_their_image() -> None:
    stacked = stack_regions([torch.zeros(0, 4), torch.ones(2, 4), torch.full((1, 4), 3.0)])
    assert stacked.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [2, 3, 3, 3, 3]]


def test_too_few_levels_is_an_error_with_numbers() -> None:
    with pytest.raises(ValueError, match="levels is 4, but the backbone gives 2"):
        RegionAlign()([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)], torch.zeros(0, 5), [4, 8])
