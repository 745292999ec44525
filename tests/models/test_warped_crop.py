import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from detseg.models.warped_crop import WarpedCrop, widen


def slow(image: Tensor, box: list[float], size: int, context: float) -> Tensor:
    """One pixel at a time: where its centre lies in the image, and the four pixels around it; none outside."""
    left, top, right, bottom = box
    scale_x, scale_y = (right - left) / (size - 2 * context), (bottom - top) / (size - 2 * context)
    crop = torch.zeros(len(image), size, size)
    for row in range(size):
        for column in range(size):
            x = left + (column + 0.5 - context) * scale_x - 0.5
            y = top + (row + 0.5 - context) * scale_y - 0.5
            for j in (int(np.floor(y)), int(np.floor(y)) + 1):
                for i in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= i < image.shape[2] and 0 <= j < image.shape[1]:
                        crop[:, row, column] += (1 - abs(x - i)) * (1 - abs(y - j)) * image[:, j, i]
    return crop


BOXES = [
    [3.0, 2.0, 17.0, 9.0],
    [0.0, 0.0, 20.0, 14.0],
    [12.5, 6.25, 19.0, 13.5],
    [5.0, 5.0, 6.0, 6.0],
    [18.0, 0.0, 20.0, 14.0],
]


@pytest.mark.parametrize(("size", "context"), [(11, 2.0), (16, 0.0), (7, 1.5)])
def test_is_the_slow_twin(size: int, context: float) -> None:
    images = torch.randn(2, 3, 14, 20, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[index % 2, *box] for index, box in enumerate(BOXES)])
    crops = WarpedCrop(output_size=size, context=context)([images], regions, [1])
    expected = torch.stack([slow(images[index % 2], box, size, context) for index, box in enumerate(BOXES)])
    assert_close(crops, expected, rtol=1e-4, atol=1e-5)


def test_without_context_the_inside_is_opencvs_bilinear_resize() -> None:
    image = torch.randn(3, 30, 40, generator=torch.Generator().manual_seed(0))
    crop = WarpedCrop(output_size=12, context=0.0)([image[None]], torch.tensor([[0.0, 4, 3, 34, 27]]), [1])[0]
    window = image[:, 3:27, 4:34].permute(1, 2, 0).contiguous().numpy()
    resized = cv2.resize(window, (12, 12), interpolation=cv2.INTER_LINEAR)
    assert_close(crop[:, 1:-1, 1:-1], torch.from_numpy(resized).permute(2, 0, 1)[:, 1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def test_context_by_hand() -> None:
    """16 of 227 pixels: a box 195 wide grows by 16 on each side, one half as high by 8."""
    assert_close(widen(torch.tensor([[100.0, 50, 295, 147.5]]), 227, 16.0), torch.tensor([[84.0, 42, 311, 155.5]]))
    size, image = 8, torch.ones(1, 3, 4, 4)
    crop = WarpedCrop(output_size=size, context=2.0)([image], torch.tensor([[0.0, 0, 0, 4, 4]]), [1])[0, 0]
    assert_close(crop[2:6, 2:6], torch.ones(4, 4))  # the image itself, pixel by pixel
    assert crop.sum() == 16  # the context is missing: the mean


def test_padding_and_company_change_nothing() -> None:
    image = torch.randn(1, 3, 14, 20, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[0.0, *box] for box in BOXES])
    pooling = WarpedCrop(output_size=9, context=2.0)
    alone = pooling([image], regions, [1])
    batch = torch.cat([torch.randn(1, 3, 32, 32), F.pad(image, (0, 12, 0, 18))])
    assert_close(pooling([batch], regions + torch.tensor([1.0, 0, 0, 0, 0]), [1]), alone)


def test_nothing_one_point_and_gradients() -> None:
    pooling = WarpedCrop(output_size=5, context=1.0)
    assert pooling.shape(3) == (3, 5, 5)
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert pooling([image], torch.zeros(0, 5), [1]).shape == (0, 3, 5, 5)
    point = pooling([image], torch.tensor([[0.0, 3.5, 3.5, 3.5, 3.5]]), [1])  # a box without area shows one pixel
    assert_close(point, image[:, :, 3, 3][:, :, None, None].expand(1, 3, 5, 5))
    point.sum().backward()
    assert image.grad is not None and float(image.grad.sum()) == pytest.approx(75)


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="output_size=32, context=16"):
        WarpedCrop(output_size=32, context=16)
