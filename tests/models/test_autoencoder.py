from __future__ import annotations

import pytest
import torch

from detseg.models import Autoencoder
from detseg.nn import BedOfNails, BilinearUpsampling, MaxUnpooling, NearestUpsampling, ResizeConvolution


def test_all_goes_through_the_smallest_map():
    model = Autoencoder(num_classes=2, widths=(4, 6, 8)).eval()
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        plain = model(images)
        handle = model.encoder[2].register_forward_hook(lambda module, given, result: torch.zeros_like(result))
        first, second = model(images), model(torch.rand(1, 3, 32, 48))
    assert torch.equal(first, second)  # without it nothing is left of the image
    handle.remove()
    assert not torch.equal(plain, first)


@pytest.mark.parametrize("kind", [BedOfNails, BilinearUpsampling, MaxUnpooling, NearestUpsampling, ResizeConvolution])
@pytest.mark.parametrize("size", [(32, 32), (1, 5)])
def test_any_way_up_and_any_size(kind, size):
    model = Autoencoder(num_classes=2, widths=(4, 6), upsample=kind)
    logits = model(torch.rand(1, 3, *size))
    assert logits.shape == (1, 2, *size)
    logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters())
