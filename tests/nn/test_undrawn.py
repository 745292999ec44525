from __future__ import annotations

import torch
from torch import nn

from detseg.nn.undrawn import undrawn


def test_a_layer_has_memory_of_its_own_and_no_random_number_is_drawn():
    before = torch.get_rng_state()
    layer = undrawn(lambda: nn.Conv2d(2, 3, 5, bias=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight.shape == (3, 2, 5, 5)
    nn.init.ones_(layer.weight)
    assert layer(torch.ones(1, 2, 5, 5)).flatten().tolist() == [50.0] * 3


def test_it_follows_the_default_device():
    with torch.device("meta"):
        assert undrawn(lambda: nn.Linear(2, 3)).weight.is_meta
