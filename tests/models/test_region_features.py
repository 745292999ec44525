import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import MultiScaleRoIAlign, roi_pool

from detseg.models.region_features import RegionAlign, RegionPool, stack_regions


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


def pooled_by_hand(level: torch.Tensor, box: list[float], stride: int, side: int) -> torch.Tensor:
    """RoIPool of one region on one map (C, H, W), cell by cell as Fast R-CNN's section 2.1 tells it."""
    x0, y0, x1, y1 = (int(value / stride + 0.5) for value in box)  # rounded half up to whole cells, ends included
    width, height = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
    out = torch.zeros(len(level), side, side)
    for row in range(side):
        for column in range(side):
            top, bottom = y0 + row * height // side, y0 + -(-(row + 1) * height // side)
            left, right = x0 + column * width // side, x0 + -(-(column + 1) * width // side)
            window = level[:, max(top, 0) : bottom, max(left, 0) : right]
            if window.numel():
                out[:, row, column] = window.amax(dim=(1, 2))
    return out


def test_pooling_equals_torchvision_and_the_paper() -> None:
    features = [torch.randn(2, 4, 32, 32)]
    regions = stack_regions([boxes(30), boxes(20)])
    ours = RegionPool(output_size=3)(features, regions, [8])
    assert ours.shape == (50, *RegionPool(output_size=3).shape(4))
    assert_close(ours, roi_pool(features[0], regions, 3, 1 / 8))
    for index in range(0, 50, 7):
        image, *box = regions[index].tolist()
        assert_close(ours[index], pooled_by_hand(features[0][int(image)], box, 8, 3))


def test_pooling_on_a_pyramid_reads_each_region_from_its_level() -> None:
    features = [torch.full((1, 1, 64 // 2**level, 64 // 2**level), float(level)) for level in range(3)]
    pool = RegionPool(output_size=2, levels=3, canonical_size=64.0, canonical_level=3)
    squares = torch.tensor([[0.0, 0, 200, 200], [0, 0, 30, 30], [0, 0, 70, 70]])
    assert pool(features, stack_regions([squares]), [4, 8, 16])[:, 0, 0, 0].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="RegionPool: levels is 3, but the backbone gives 1"):
        pool(features[:1], torch.zeros(0, 5), [4])
