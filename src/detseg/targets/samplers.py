"""Random mini-batches with a fixed share of positives.

From `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_, section 3.1.3, and `"Fast R-CNN"
<https://arxiv.org/abs/1504.08083>`_, section 2.3. Draws in torchvision's order, so that one seed gives both
the same samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BalancedSampler:
    """Draw up to ``size`` samples of an image, at most ``positive_fraction`` of them positive, the rest background.

    Args:
        size: samples per image.
        positive_fraction: largest share of positives, in [0, 1]; background fills what is missing.

    Raises:
        ValueError: ``size`` below 1, or the share outside [0, 1].
    """

    def __init__(self, *, size: int, positive_fraction: float) -> None:
        if size < 1 or not 0.0 <= positive_fraction <= 1.0:
            raise ValueError(
                f"BalancedSampler: size is {size} and positive_fraction {positive_fraction}; "
                "size must be at least 1 and the fraction in [0, 1]"
            )
        self.size = size
        self.positive_fraction = positive_fraction

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the drawn positives and of the drawn background, each int64 and ascending.

        Args:
            labels: ``(N,)``, above 0 positive, 0 background, below 0 never drawn.
        """
        positive = (labels > 0).nonzero().flatten()  # (P,)
        background = (labels == 0).nonzero().flatten()  # (Q,)
        count = min(len(positive), int(self.size * self.positive_fraction))
        rest = min(len(background), self.size - count)
        return _draw(positive, count), _draw(background, rest)

    def __repr__(self) -> str:
        return f"BalancedSampler(size={self.size}, positive_fraction={self.positive_fraction})"


def _draw(indices: Tensor, count: int) -> Tensor:
    chosen = torch.randperm(len(indices), device=indices.device)[:count]  # (count,)
    return indices[chosen].sort().values if count < len(indices) else indices  # (count,)
