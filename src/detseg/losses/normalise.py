"""Sums over a batch that is spread over several processes: by how many positives a loss is divided, and Dice's parts.

Lin et al. 2017 (arXiv:1708.02002, section 4.1) divide by the anchors assigned to a box, Tian et al. 2020
(arXiv:2006.09214, equation 2) by the positive points. Under DDP gradients are averaged over ranks; dividing by the
average count makes the average equal to what one process with the whole batch would compute.

Without gradients, thus in validation, ranks may hold different numbers of batches, and one that waited for the others
would wait for ever; there each rank counts for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def weighted_sum(loss: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of losses ``(P,)`` with weights ``(P,)``, a scalar; ``None`` weighs all by 1."""
    return loss.sum() if weights is None else (loss * weights).sum()


def normaliser(count: Tensor, *, least: float = 1.0) -> Tensor:
    """Return by what the sum of a loss is divided: the count, at least ``least``; in training its average over ranks.

    Args:
        count: scalar, the positives of this rank, or the sum of their weights.
        least: smallest count of all ranks together; the average may be below it.

    Returns:
        scalar on the same device, float32 or as wide as the count.
    """
    total = count.detach().to(torch.promote_types(count.dtype, torch.float32))
    ranks = ranks_in_training()
    if ranks > 1:
        total = total.clone()
        distributed.all_reduce(total)
    return total.clamp(min=least) / ranks


def sum_over_ranks(part: Tensor) -> Tensor:
    """Return the sum over ranks of what each has added up, for losses that are no sum over images, such as Dice.

    Args:
        part: any shape, equal on all ranks.

    Returns:
        the same shape. Its gradient reaches this rank's part alone, times the number of ranks, so that the average
        over ranks is the gradient of the whole.
    """
    ranks = ranks_in_training()
    if ranks == 1:
        return part
    total = part.detach().clone()
    distributed.all_reduce(total)
    return total + ranks * (part - part.detach())


def ranks_in_training() -> int:
    """Return over how many processes the batch is spread; 1 without gradients, as then none may wait for another."""
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
