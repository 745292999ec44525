"""Proposals on their way from a batch to the model."""

from __future__ import annotations

from torch import Tensor

from detseg.structures import Batch


def given_proposals(batch: Batch) -> dict[str, list[Tensor]]:
    """Return the argument ``proposals`` of a model that gets them, nothing for all others, which know no such argument.

    Args:
        batch: with the images.
    """
    return {} if batch.proposals is None else {"proposals": batch.proposals}
