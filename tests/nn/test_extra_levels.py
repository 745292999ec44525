from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn import BackboneWithExtras, TimmBackbone, TinyBackbone
from detseg.nn.extra_levels import L2Norm

EXTRA = [[16, 3, 2, 1], [8, 3, 1, 0]]


def build(**arguments) -> BackboneWithExtras:
    body = TinyBackbone(widths=(8, 12), strides=(4, 8))
    return BackboneWithExtras(backbone=body, **({"extra": EXTRA} | arguments)).eval()


@pytest.mark.parametrize("kind", ["plain", "batch"])
def test_levels_have_the_widths_and_sizes_that_were_asked_for(kind: str) -> None:
    backbone = build(kind=kind)
    levels = backbone(torch.rand(2, 3, 96, 112))
    assert backbone.channels == [8, 12, 16, 8] and backbone.strides == [4, 8, 16, 16]
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 24, 28), (12, 12, 14), (16, 6, 7), (8, 4, 5)]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in backbone.extra.modules()) == (4 if kind == "batch" else 0)
    assert backbone.mean == backbone.body.mean


def test_a_further_level_is_made_of_the_last_map_of_the_body() -> None:
    backbone = build(l2_scale=20.0)
    images = torch.rand(1, 3, 64, 64)
    fine, coarse = backbone.body(images)
    levels = backbone(images)
    assert_close(levels[0].norm(dim=1), 20 * (fine != 0).any(dim=1).float())
    assert_close(levels[0][0, :, 3, 3], 20 * fine[0, :, 3, 3] / fine[0, :, 3, 3].norm())
    assert_close(levels[1], coarse)
    assert_close(levels[3], backbone.extra[1](backbone.extra[0](coarse)))


def test_separable_levels_have_depthwise_convolutions() -> None:
    backbone = build(kind="separable", extra=[[16, 3, 2, 1]], norm_momentum=0.2)
    assert [tuple(level.shape[2:]) for level in backbone(torch.rand(1, 3, 64, 64))] == [(16, 16), (8, 8), (4, 4)]
    convolutions = [layer for layer in backbone.extra.modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.kernel_size[0], layer.groups, layer.out_channels) for layer in convolutions] == [
        (1, 1, 8),
        (3, 8, 8),
        (1, 1, 16),
    ]
    assert {layer.momentum for layer in backbone.extra.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.2}


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (20, 9)])
def test_images_smaller_than_the_kernels_reach_every_level(size: tuple[int, int]) -> None:
    backbone = build(extra=[*EXTRA, [8, 3, 1, 0], [8, 4, 1, 1]])
    levels = backbone(torch.rand(1, 3, *size))
    assert len(levels) == 6 and min(min(level.shape[2:]) for level in levels) >= 1
    torch.stack([level.sum() for level in levels]).sum().backward()
    assert all(value.grad is not None for value in backbone.parameters())


def test_a_body_of_timm_serves() -> None:
    body = TimmBackbone(name="mobilenetv3_small_050", strides=(8, 16))
    levels = BackboneWithExtras(backbone=body, extra=EXTRA, kind="batch").eval()(torch.rand(1, 3, 64, 64))
    assert [level.shape[2] for level in levels] == [8, 4, 2, 1]


def test_a_cell_of_zeros_stays_zero_and_has_no_gradient_beyond_numbers() -> None:
    level = torch.zeros(1, 3, 1, 2)
    level[0, :, 0, 1] = torch.tensor([3.0, 0, 4])
    norm = L2Norm(3, 10.0)
    found = norm(level.requires_grad_())
    assert_close(found[0, :, 0], torch.tensor([[0.0, 6], [0, 0], [0, 8]]))
    found.sum().backward()
    assert bool(level.grad.isfinite().all()) and bool(norm.weight.grad.isfinite().all())


def test_rows_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be plain, batch or separable, not 'lite'"):
        build(kind="lite")
    for extra in ([], [[16, 3, 2]], [[15, 3, 2, 1]], [[16, 3, 0, 1]], [[16, 3, 2, -1]]):
        with pytest.raises(ValueError, match="give every further level its channels"):
            build(extra=extra)
    with pytest.raises(ValueError, match=r"\[\[16, 3, 1, 0\], \[16, 4, 1, 2\]\] do not fit kind separable"):
        build(extra=[[16, 3, 2, 1], [16, 3, 1, 0], [16, 4, 1, 2]], kind="separable")
