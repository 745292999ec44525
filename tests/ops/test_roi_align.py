import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

from detseg.ops import roi_align as module
from detseg.ops.roi_align import pyramid_roi_align

STRIDES = [4, 8]


def pyramid() -> list[Tensor]:
    return [torch.randn(2, 6, 24, 32, requires_grad=True), torch.randn(2, 6, 12, 16, requires_grad=True)]


def regions(count: int) -> Tensor:
    """Regions of all kinds: over the border, thinner than a cell, as large as the image."""
    corner = torch.rand(count, 2) * torch.tensor([128.0, 96.0]) - 6
    side = torch.rand(count, 2) ** 3 * 120
    image = torch.randint(0, 2, (count, 1)).float()
    return torch.cat([image, corner, corner + side], dim=1)


def by_torchvision(features: list[Tensor], rois: Tensor, level: Tensor, size: int, samples: int) -> Tensor:
    result = torch.zeros(len(rois), 6, size, size)
    for index, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        row = level == index
        result[row] = torchvision.ops.roi_align(feature, rois[row], size, 1 / stride, samples)
    return result


@pytest.mark.parametrize("size, samples", [(7, 2), (14, 2), (3, 1), (5, 3), (7, 0)])
def test_values_and_gradients_equal_torchvision(size: int, samples: int) -> None:
    features, rois = pyramid(), regions(60)
    level = torch.randint(0, 2, (60,))
    expected = by_torchvision(features, rois, level, size, samples)
    pooled = pyramid_roi_align(features, rois, level, STRIDES, size, samples)
    assert expected.abs().max() > 1
    assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * upstream).sum(), features)
    given = torch.autograd.grad((pooled * upstream).sum(), features)
    for mine, theirs in zip(given, wanted, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, rois = [feature.detach() for feature in pyramid()], regions(50)
    level = torch.randint(0, 2, (50,))
    whole = pyramid_roi_align(features, rois, level, STRIDES, 7, 2)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert_close(pyramid_roi_align(features, rois, level, STRIDES, 7, 2), whole, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [2, 0])
def test_no_regions_keep_the_graph(samples: int) -> None:
    features = pyramid()
    none = torch.zeros(0, dtype=torch.int64)
    pooled = pyramid_roi_align(features, torch.zeros(0, 5), none, STRIDES, 7, samples)
    assert pooled.shape == (0, 6, 7, 7)
    pooled.sum().backward()
    assert features[0].grad is not None and not features[0].grad.any()


def test_half_precision_is_read_in_full() -> None:
    features, rois = [feature.detach().bfloat16() for feature in pyramid()], regions(10)
    level = torch.zeros(10, dtype=torch.int64)
    pooled = pyramid_roi_align(features, rois, level, STRIDES, 7, 2)
    assert pooled.dtype == torch.float32
    assert_close(pooled, by_torchvision([feature.float() for feature in features], rois, level, 7, 2))


def test_wild_coordinates_do_not_crash() -> None:
    wild = torch.tensor([[0, -1e30, 0, 1e30, 9], [1, float("nan"), 0, 5, 9], [1, 0, 0, float("inf"), 9]])
    pooled = pyramid_roi_align(pyramid(), wild, torch.zeros(3, dtype=torch.int64), STRIDES, 7, 2)
    assert pooled.shape == (3, 6, 7, 7)
