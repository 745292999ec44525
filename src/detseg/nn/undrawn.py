"""Layers whose weights are not drawn: a hundred million numbers that are replaced at once would take a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def undrawn(build: Callable[[], ModuleT]) -> ModuleT:
    """Build a layer with memory for its weights, but nothing in it; whoever calls this has to fill it.

    Args:
        build: makes the layer, such as ``lambda: nn.Conv2d(512, 4096, 7)``.

    Returns:
        The layer on the default device.
    """
    with torch.device("meta"):
        layer = build()
    return layer.to_empty(device=torch.get_default_device())
