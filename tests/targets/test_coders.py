import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder

from detseg.targets.coders import BoxCoder

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 200
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 100], dim=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_decode_inverts_encode(seed: int) -> None:
    # A box may be at most 1000 / 16 times its anchor: deltas beyond are clipped by design.
    truth, anchors = boxes(20, seed), boxes(20, seed + 1).clamp(min=0)
    coder = BoxCoder(weights=WEIGHTS, clip=math.log(1000))
    assert_close(coder.decode(coder.encode(truth, anchors), anchors), truth, rtol=1e-4, atol=1e-3)


def test_equals_torchvision() -> None:
    truth, anchors = boxes(50, 0), boxes(50, 1)
    theirs = TorchvisionCoder(WEIGHTS)
    ours = BoxCoder(weights=WEIGHTS)
    assert_close(ours.encode(truth, anchors), theirs.encode_single(truth, anchors), rtol=1e-5, atol=1e-5)
    deltas = torch.randn(50, 3 * 4) * 8
    expected = theirs.decode_single(deltas, anchors).reshape(50, 3, 4)
    assert_close(ours.decode(deltas.view(50, 3, 4), anchors[:, None]), expected, rtol=1e-5, atol=1e-4)


def test_by_hand() -> None:
    # Anchor 10 x 20 at centre (5, 10); box 20 x 20 at centre (10, 10): half a width right, twice as wide.
    deltas = BoxCoder().encode(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 10, 20]]))
    assert_close(deltas, torch.tensor([[0.5, 0.0, math.log(2), 0.0]]))


def test_degenerate_boxes_give_finite_targets() -> None:
    flat = torch.tensor([[5.0, 5, 5, 9]])
    normal = torch.tensor([[0.0, 0, 10, 10]])
    assert BoxCoder().encode(flat, normal).isfinite().all()
    assert BoxCoder().encode(normal, flat).isfinite().all()


def test_decode_clips_growth() -> None:
    decoded = BoxCoder().decode(torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert_close(decoded[0, 2:] - decoded[0, :2], torch.tensor([1000.0, 1000.0]))


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2, 3\].*four positive"):
        BoxCoder(weights=[1, 2, 3])
