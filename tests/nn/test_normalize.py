from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.nn import Normalize
from detseg.nn.normalize import padding_mask


def test_numbers_and_padding():
    normalize = Normalize(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = torch.ones(2, 3, 4, 6)
    result = normalize(images, torch.tensor([[4, 6], [2, 5]]))
    assert_close(result[0], torch.tensor([1.0, 3.0, 0.5])[:, None, None].expand(3, 4, 6))
    assert_close(result[1, :, :2, :5], torch.tensor([1.0, 3.0, 0.5])[:, None, None].expand(3, 2, 5))
    assert result[1, :, 2:].abs().sum() == 0
    assert result[1, :, :, 5:].abs().sum() == 0
    assert_close(normalize(images), normalize(images, torch.tensor([[4, 6], [4, 6]])))
    assert images.min() == 1  # the caller's images are left alone


def test_travels_in_the_state_dict():
    other = Normalize(mean=(0, 0, 0), std=(1, 1, 1))
    other.load_state_dict(Normalize(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).state_dict())
    assert_close(other.mean, torch.tensor([0.1, 0.2, 0.3]))
    assert_close(other.std, torch.tensor([0.4, 0.5, 0.6]))


def test_padding_mask():
    assert padding_mask(torch.tensor([[3, 2]]), (3, 2)) is None
    assert padding_mask(torch.tensor([[1, 1]]), (2, 2)).tolist() == [[[False, True], [True, True]]]


def test_errors():
    with pytest.raises(TypeError, match=r"images are torch.uint8.*float\(\) / 255"):
        Normalize()(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one number per channel, std > 0"):
        Normalize(mean=(0.5,), std=(0.0,))
