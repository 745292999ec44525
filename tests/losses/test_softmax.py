from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.losses import SoftmaxLoss, softmax_loss


def test_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(2), 0.0], [math.log(6), 0.0, 0.0]]])  # background, then two classes
    labels = torch.tensor([[0, -1]])
    assert_close(softmax_loss(logits, labels), torch.tensor([[math.log(2), math.log(8 / 6)]]))
    assert_close(softmax_loss(logits, torch.tensor([[1, -2]])), torch.tensor([[math.log(4), math.log(8 / 6)]]))


def test_smoothing_is_torchs() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = SoftmaxLoss(label_smoothing=0.1)(logits, torch.tensor([-1, 0, 1, 3]))
    assert_close(found, F.cross_entropy(logits, torch.tensor([0, 1, 2, 4]), reduction="none", label_smoothing=0.1))


def test_half_precision_is_summed_in_single() -> None:
    logits = torch.tensor([[4.0, 1.0]], dtype=torch.bfloat16)
    found = softmax_loss(logits, torch.tensor([0]))
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor([3 + math.log(1 + math.exp(-3))]))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3,\)"):
        softmax_loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        SoftmaxLoss(label_smoothing=1.0)
    assert softmax_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
