"""Buffers of a model that trains on several processes."""

from __future__ import annotations

import torch
from torch import distributed, nn

from detseg.tasks.processes import world_size


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Take the first process's buffers everywhere, as DDP does before a training step.

    Each process moves the means of its batch norms by its own images; measured with those, no checkpoint would have the
    figures. Without other processes nothing happens.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
