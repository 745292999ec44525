"""Which anchors or regions teach: some at random with a fixed share of positives, the hardest, the hardest background.

The first is that of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_, section 3.1.3, and `"Fast R-CNN"
<https://arxiv.org/abs/1504.08083>`_, section 2.3; it draws in torchvision's order, so that one seed gives both the same
samples. The second is that of `"Training Region-based Object Detectors with Online Hard Example Mining"
<https://arxiv.org/abs/1604.03540>`_, section 4. The third is that of `"SSD: Single Shot MultiBox Detector"
<https://arxiv.org/abs/1512.02325>`_, section 2.2; differing from it, images without objects may have background too.

Letters: B images, N anchors or regions of one image, S of them chosen.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from detseg.ops.nms import BatchedNMS
from detseg.targets.matchers import BELOW


class Sampler(Protocol):
    """Anything that says which rows of an image may teach, from what they are matched to."""

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of positives and of background, each int64 and ascending; see ``BalancedSampler``."""
        ...


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


class HardSampler:
    """Keep the ``size`` regions of an image that have the largest loss, whatever they are.

    Regions that overlap much have much the same loss, and would teach the same several times: of these the hardest
    alone stays (section 4.1).

    Args:
        size: regions per image.
        threshold: IoU with a harder region above which one is dropped, in [0, 1].

    Raises:
        ValueError: ``size`` below 1, or the threshold outside [0, 1].
    """

    def __init__(self, *, size: int, threshold: float = 0.7) -> None:
        if size < 1:
            raise ValueError(f"HardSampler: size is {size}; it must be at least 1")
        self.size = size
        self.nms = BatchedNMS(threshold=threshold, class_agnostic=True)

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return all positives and all background: who is hard shows when their losses are known, see ``hardest``."""
        return (labels > 0).nonzero().flatten(), (labels == 0).nonzero().flatten()

    def hardest(self, boxes: Tensor, losses: Tensor) -> Tensor:
        """Return the rows of the chosen regions ``(S,)`` int64, ascending.

        Args:
            boxes: ``(N, 4)`` xyxy pixels.
            losses: ``(N,)``; one that is not finite counts as the hardest, so that it is seen.
        """
        most = torch.finfo(losses.dtype).max
        keep, _ = self.nms(boxes, losses.nan_to_num(nan=most, posinf=most), torch.zeros_like(losses).long())  # (K,)
        return keep[: self.size].sort().values  # (S,)

    def __repr__(self) -> str:
        return f"HardSampler(size={self.size}, threshold={self.nms.threshold})"


class HardNegativeMining:
    """Keep of every image the background whose loss is largest, in proportion to its positives.

    Args:
        ratio: background anchors per positive one.
        least: of an image, even where it has no positive: 0 in the paper, so that images without objects teach nothing.

    Raises:
        ValueError: ``ratio`` or ``least`` is negative, or both are 0.
    """

    def __init__(self, *, ratio: float = 3.0, least: int = 0) -> None:
        if min(ratio, least) < 0 or ratio + least == 0:
            raise ValueError(
                f"HardNegativeMining: ratio is {ratio} and least {least}; neither may be negative, and one must be "
                "above 0, or no background is learnt"
            )
        self.ratio = ratio
        self.least = least

    def __call__(self, losses: Tensor, matched: Tensor) -> Tensor:
        """Return which background anchors teach, ``(B, N)`` bool; of equal losses the earlier comes first.

        Args:
            losses: ``(B, N)``; NaN counts as the hardest, so that it is seen.
            matched: ``(B, N)`` int64: >= 0 positive, ``BELOW`` (-1) background, lower ones never chosen.
        """
        background = matched == BELOW  # (B, N)
        hardness = losses.detach().masked_fill(~background, -torch.inf)  # (B, N)
        order = hardness.argsort(dim=1, descending=True, stable=True)  # (B, N)
        wanted = (self.ratio * (matched >= 0).sum(dim=1, keepdim=True)).clamp(min=self.least)  # (B, 1)
        first = torch.arange(losses.shape[1], device=losses.device) < wanted  # (B, N), by rank
        return torch.zeros_like(background).scatter_(1, order, first) & background  # too few: no others instead

    def __repr__(self) -> str:
        return f"HardNegativeMining(ratio={self.ratio}, least={self.least})"


def _draw(indices: Tensor, count: int) -> Tensor:
    chosen = torch.randperm(len(indices), device=indices.device)[:count]  # (count,)
    return indices[chosen].sort().values if count < len(indices) else indices  # (count,)
