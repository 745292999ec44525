import pytest
import torch
from torch.testing import assert_close

from detseg.losses.smooth_l1 import SmoothL1, smooth_l1


def test_by_hand() -> None:
    # beta 0.5: 0.2 lies in the bowl (0.2^2 / (2 * 0.5) = 0.04), 1.0 on the slope (1 - 0.25 = 0.75).
    loss = smooth_l1(torch.tensor([[0.2, 0.0, 1.0, 0.0]]), torch.zeros(1, 4), beta=0.5)
    assert_close(loss, torch.tensor(0.79))


def test_zero_beta_is_l1() -> None:
    assert_close(SmoothL1(beta=0.0)(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2)), torch.tensor(3.0))


def test_empty_input_keeps_the_graph() -> None:
    prediction = torch.zeros(0, 4, requires_grad=True)
    loss = SmoothL1()(prediction, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert prediction.grad is not None


def test_negative_beta() -> None:
    with pytest.raises(ValueError, match="beta is -1"):
        SmoothL1(beta=-1)
