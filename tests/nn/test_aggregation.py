from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.nn.aggregation import DeepAggregation
from detseg.nn.backbone import TimmBackbone
from detseg.nn.tiny import TinyBackbone


def _model(**options: object) -> DeepAggregation:
    body = TinyBackbone(widths=(8, 12, 16, 20), stem=8)
    return DeepAggregation(backbone=body, **options)


def _grown(level: Tensor, factor: int, like: Tensor) -> Tensor:
    large = F.interpolate(level, scale_factor=factor, mode="bilinear")
    return large[:, :, : like.shape[2], : like.shape[3]]


@pytest.mark.parametrize("size", [(64, 96), (70, 33)])
def test_maps_are_merged_in_the_order_of_the_figure(size: tuple[int, int]) -> None:
    model = _model().eval()
    images = torch.rand(1, 3, *size)
    x4, x8, x16, x32 = model.body(images)

    def merge(part: nn.Module, index: int, coarse: Tensor, before: Tensor, factor: int = 2) -> Tensor:
        return part.nodes[index](_grown(part.projections[index](coarse), factor, before) + before)

    first, second, third = model.rounds
    at16 = merge(first, 0, x32, x16)
    early8 = merge(second, 0, x16, x8)
    at8 = merge(second, 1, at16, early8)
    early4 = merge(third, 0, x8, x4)
    at4 = merge(third, 2, at8, merge(third, 1, early8, early4))
    wanted = merge(model.final, 1, at16, merge(model.final, 0, at8, at4), 4)
    found = model(images)
    assert_close(found, [wanted])
    assert tuple(wanted.shape) == (1, 8, -(-size[0] // 4), -(-size[1] // 4))
    assert (model.channels, model.strides) == ([8], [4])


@pytest.mark.parametrize("strides", [(8, 16), (4, 8, 16, 32)])
def test_levels_take_widths_of_their_own_and_all_weights_are_used(strides: tuple[int, ...]) -> None:
    body = TinyBackbone(widths=(8, 12, 16, 20), stem=8, strides=strides)
    model = DeepAggregation(backbone=body, widths=[10, 14, 18, 22][: len(strides)], deformable=True)
    (level,) = model(torch.rand(2, 3, 64, 64))
    assert level.shape == (2, 10, 64 // strides[0], 64 // strides[0])
    level.sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_dla_34_keeps_the_body_of_timm_and_its_statistics() -> None:
    model = DeepAggregation(backbone=TimmBackbone(name="dla34", weights=None))
    assert sum(value.numel() for value in model.body.parameters()) == 15_229_104  # 15.74 million with the classifier
    assert (model.channels, model.strides) == ([64], [4])
    assert model.mean == pytest.approx([0.485, 0.456, 0.406])
    assert tuple(model.eval()(torch.rand(1, 3, 64, 32))[0].shape) == (1, 64, 16, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \[4\]"):
        DeepAggregation(backbone=TinyBackbone(widths=(8,), stem=8))
    with pytest.raises(ValueError, match=r"widths is \[8\]"):
        _model(widths=[8])
