from __future__ import annotations

import pytest
import torch

from detseg.models import SameSize


@pytest.mark.parametrize(("dilations", "reach"), [((1,) * 7, 7), ((1, 1, 2, 4, 8, 16, 1), 33)])
def test_a_pixel_sees_as_far_as_the_dilations_say(dilations, reach):
    model = SameSize(num_classes=2, width=3, dilations=dilations).eval()
    for layer in model.layers:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.abs_()  # so that nothing cancels
    images = torch.rand(1, 3, 81, 81, requires_grad=True)
    (slope,) = torch.autograd.grad(model(images)[0, :, 40, 40].sum(), images)
    rows = slope.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert (rows[0], rows[-1]) == (40 - reach, 40 + reach)


def test_dilation_costs_nothing():
    plain, dilated = (SameSize(num_classes=2, width=4, dilations=given) for given in ((1, 1, 1), (1, 4, 16)))
    assert sum(value.numel() for value in plain.parameters()) == sum(value.numel() for value in dilated.parameters())


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (1, 9)])
def test_logits_have_the_size_of_the_input(size):
    assert SameSize(num_classes=2, width=3)(torch.rand(1, 3, *size)).shape == (1, 2, *size)


def test_errors():
    with pytest.raises(ValueError, match=r"dilations \[\] must name one layer"):
        SameSize(num_classes=2, dilations=())
