from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn import convolutionalise


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 2, bias=False))


@pytest.mark.parametrize("share", [False, True])
def test_every_place_says_what_its_patch_says(share):
    network = classifier().eval()
    converted = convolutionalise(network, (3, 4, 5), share=share).eval()
    maps = torch.randn(2, 3, 6, 9)
    with torch.no_grad():
        dense = converted(maps)
        assert dense.shape == (2, 2, 3, 5)
        for row in range(3):
            for column in range(5):
                patch = maps[:, :, row : row + 4, column : column + 5]
                assert_close(dense[:, :, row, column], network(patch))


@pytest.mark.parametrize("share", [False, True])
def test_dilated_places_belong_to_one_patch(share):
    network = classifier().eval()
    maps = torch.randn(1, 3, 8, 10)
    with torch.no_grad():
        dense = convolutionalise(network, (3, 4, 5), share=share, dilation=2).eval()(maps)
        assert dense.shape == (1, 2, 2, 2)
        assert_close(dense[:, :, 1, 0], network(maps[:, :, 1::2, 0::2]))


def test_copies_and_shared_weights():
    network = classifier()
    copied, shared = convolutionalise(network, (3, 4, 5)), convolutionalise(network, (3, 4, 5), share=True)
    assert [layer.kernel_size for layer in copied if isinstance(layer, nn.Conv2d)] == [(4, 5), (1, 1)]
    assert_close(copied[0].weight.flatten(1), network[1].weight)
    shared(torch.randn(1, 3, 4, 5)).sum().backward()
    assert float(network[1].weight.grad.abs().max()) > 0
    with torch.no_grad():
        network[1].weight.zero_()
    assert float(copied[0].weight.detach().abs().max()) > 0
    assert float(shared[0].kernel.detach().abs().max()) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"60 inputs does not see maps of \(3, 4, 4\), which have 48"):
        convolutionalise(classifier(), (3, 4, 4))
