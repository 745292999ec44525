"""`"Training Region-based Object Detectors with Online Hard Example Mining" <https://arxiv.org/abs/1604.03540>`_.

Shrivastava, Gupta and Girshick, 2016, section 4: a read-only pass of the second stage over all proposals gives each its
loss, and the hardest alone are learnt from. Differs: norm and dropout layers work as in prediction in that pass, so
that it leaves no trace in their statistics and chance does not choose.

Letters: B images, R regions of all images, S chosen regions of one image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import compared
from detseg.targets.samplers import HardSampler

if TYPE_CHECKING:
    from detseg.models.box_branch import BoxBranch, RegionSamples

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of (prediction, target), summed to a scalar."""


@torch.no_grad()
def hard_regions(
    branch: BoxBranch,
    sampler: HardSampler,
    features: Sequence[Tensor],
    samples: RegionSamples,
    strides: Sequence[int],
) -> list[Tensor]:
    """Return which regions to learn from, per image ``(S,)`` rows of ``samples``.

    Args:
        branch: gives the losses.
        sampler: chooses by them.
        features: per level ``(B, C, H, W)``.
        samples: all regions that may teach.
        strides: pixels per cell of each level.
    """
    with predicting(branch):
        logits, deltas = branch(features, samples.boxes, strides)  # (R, K + 1), (R, K + 1, 4) or (R, 1, 4)
    losses = region_losses(branch, logits, deltas, samples)  # (R,)
    parts = torch.split(losses, [len(boxes) for boxes in samples.boxes])  # per image (N,)
    return [sampler.hardest(boxes, part) for boxes, part in zip(samples.boxes, parts, strict=True)]


def region_losses(branch: BoxBranch, logits: Tensor, deltas: Tensor, samples: RegionSamples) -> Tensor:
    """Return each region's share of the branch's loss before division, ``(R,)``: its class, and its box if it has one.

    Args:
        branch: whose losses they are.
        logits: ``(R, K + 1)``.
        deltas: ``(R, K + 1, 4)``, or ``(R, 1, 4)`` where one box serves all classes.
        samples: the regions.
    """
    labels = torch.cat(samples.labels)  # (R,)
    column = torch.zeros_like(labels) if deltas.shape[1] == 1 else labels  # (R,)
    chosen = deltas[torch.arange(len(labels), device=labels.device), column]  # (R, 4)
    pairs = compared(branch.box_loss, branch.coder, chosen, torch.cat(samples.truth), torch.cat(samples.boxes))
    of_box = one_by_one(branch.box_loss, *pairs)  # (R,)
    return one_by_one(branch.classification_loss, logits, labels) + of_box.where(labels > 0, 0.0)  # (R,)


def one_by_one(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """Return what a summed loss says of each row alone, ``(R,)``.

    One pass over all rows; a loss with a backward of its own, which ``torch.vmap`` refuses, is asked row by row.

    Args:
        loss: of (prediction, target), summed to a scalar.
        prediction: ``(R, ...)``.
        target: ``(R, ...)``.
    """

    def alone(row: Tensor, wanted: Tensor) -> Tensor:
        return loss(row[None], wanted[None])

    if len(prediction) == 0:
        return prediction.new_zeros(0)
    try:
        each: Tensor = torch.vmap(alone)(prediction, target)  # (R,)
    except RuntimeError:
        each = torch.stack([alone(*pair) for pair in zip(prediction, target, strict=True)])  # (R,)
    return each


@contextmanager
def predicting(module: nn.Module) -> Iterator[None]:
    """Let all layers below ``module`` work as in prediction; afterwards each is in the mode that it was in."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
