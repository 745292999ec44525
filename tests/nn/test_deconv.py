from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from detseg.nn.deconv import DeconvBackbone
from detseg.nn.tiny import TinyBackbone


def _body() -> TinyBackbone:
    return TinyBackbone(widths=(8, 8, 16, 24), stem=8, strides=[32])


@pytest.mark.parametrize("options", [{}, {"convolution": True}, {"convolution": True, "deformable": True}])
@pytest.mark.parametrize("size", [(64, 96), (70, 33)])
def test_three_doublings_lead_from_stride_32_to_4(options: dict[str, bool], size: tuple[int, int]) -> None:
    model = DeconvBackbone(backbone=_body(), widths=(16, 12, 8), **options).eval()
    (level,) = model(torch.rand(2, 3, *size))
    assert tuple(level.shape) == (2, 8, -(-size[0] // 4), -(-size[1] // 4))
    assert (model.channels, model.strides) == ([8], [4])


def test_the_weights_of_both_papers() -> None:
    plain = DeconvBackbone(backbone=_body())  # Simple Baselines: three times 256 channels of 4 x 4
    assert sum(value.numel() for value in plain.up.parameters()) == 16 * 256 * (24 + 256 + 256) + 3 * 2 * 256
    wide = [24, 256, 128, 64]  # CenterNet: a 3x3 convolution before each, then the doubling of equal width
    count = sum(9 * before * after + 16 * after * after + 4 * after for before, after in pairwise(wide))
    model = DeconvBackbone(backbone=_body(), widths=(256, 128, 64), convolution=True)
    assert sum(value.numel() for value in model.up.parameters()) == count


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="6 transposed convolutions cannot bring a map of stride 32"):
        DeconvBackbone(backbone=_body(), widths=(8,) * 6)
    with pytest.raises(ValueError, match="set convolution too"):
        DeconvBackbone(backbone=_body(), deformable=True)
