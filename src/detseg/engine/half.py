"""``trainer.precision=bf16-true``: weights, their gradients and the optimiser's state in 16 bits.

Lightning's own plugin converts the batch too, where bfloat16 keeps no pixel of a box beyond 256, and makes 16 bits the
default type, in which anchors are then counted. Here the batch, the norms, the biases and all buffers stay in float32,
and products are made in 16 bits as with ``bf16-mixed``. Memory is what it saves: an update smaller than 1/256 of a
weight is lost, which slows the last, small steps of a schedule.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import nn


class HalfWeights(Precision):
    """Keeps every weight of two dimensions and more in bfloat16.

    Args:
        device: ``"cuda"`` or ``"cpu"``, where the products are made.
    """

    precision = "bf16-true"

    def __init__(self, *, device: str) -> None:
        super().__init__()
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights in place."""
        for parameter in module.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of training, validation and prediction steps."""
        context: AbstractContextManager[Any] = torch.autocast(self.device, dtype=torch.bfloat16)
        return context
