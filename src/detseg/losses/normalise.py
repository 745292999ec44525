"""By how many positives a loss is divided, also where a batch is spread over several processes.

Lin et al. 2017 (arXiv:1708.02002, section 4.1) divide by the anchors assigned to a box, Tian et al. 2020
(arXiv:2006.09214, equation 2) by the positive points. Under DDP gradients are averaged over ranks; dividing by the
average count makes the average equal to what one process with the whole batch would compute.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def normaliser(count: Tensor) -> Tensor:
    """Return the count of positives, at least 1; where gradients are wanted, its average over ranks.

    Without gradients, thus in validation, ranks may hold different numbers of batches, and one that waited for the
    others would wait for ever; there each rank divides by its own count.

    Args:
        count: scalar, the positives of this rank.

    Returns:
        scalar float32 on the same device.
    """
    total = count.detach().to(torch.float32)
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        total = total.clone()
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total.clamp(min=1.0)
