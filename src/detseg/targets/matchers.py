"""Which object an anchor or a proposal shall learn, by IoU.

The rule is that of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_, section 3.1.2.
Equal to torchvision's Matcher but for three things: an image without objects is allowed; an object that no anchor
touches makes no anchor positive (there, every anchor of IoU 0 becomes positive); two thresholds that agree need no
ignored band.

Letters: M objects, N anchors or proposals.
"""

from __future__ import annotations

from torch import Tensor

BELOW = -1
"""Match of an anchor that is background."""
BETWEEN = -2
"""Match of an anchor that neither trains as an object nor as background."""


class IoUMatcher:
    """Match each column of an IoU matrix to its best row.

    Args:
        positive: IoU from which an anchor learns its best object.
        negative: IoU below which it is background; between the two it is ignored.
        allow_low_quality: whether the best anchors of each object learn it in any case, however low their IoU (ties
            too), so that no object goes without.
        lowest: IoU below which it is ignored too. Fast R-CNN takes background from 0.1 up (section 2.3), which leans it
            towards hard examples. Where an image has no objects all is background, whatever this says.

    Raises:
        ValueError: not 0 <= lowest <= negative <= positive <= 1.
    """

    def __init__(self, *, positive: float, negative: float, allow_low_quality: bool, lowest: float = 0.0) -> None:
        if not 0.0 <= lowest <= negative <= positive <= 1.0:
            raise ValueError(
                f"IoUMatcher: lowest is {lowest}, negative {negative} and positive {positive}; "
                "0 <= lowest <= negative <= positive <= 1 must hold"
            )
        self.positive = positive
        self.negative = negative
        self.lowest = lowest
        self.allow_low_quality = allow_low_quality

    def __call__(self, iou: Tensor) -> Tensor:
        """Return ``(N,)`` int64: the object of each anchor, ``BELOW`` or ``BETWEEN``.

        Args:
            iou: ``(M, N)`` in [0, 1]; M or N may be 0.
        """
        if iou.shape[0] == 0:
            return iou.new_full((iou.shape[1],), BELOW).long()  # (N,)
        best, match = iou.max(dim=0)  # (N,), (N,)
        found = match.masked_fill(best < self.positive, BETWEEN).masked_fill(best < self.negative, BELOW)  # (N,)
        found = found.masked_fill(best < self.lowest, BETWEEN)  # (N,)
        if self.allow_low_quality and iou.shape[1] > 0:
            highest = iou.amax(dim=1, keepdim=True)  # (M, 1)
            rescued = ((iou == highest) & (highest > 0)).any(dim=0)  # (N,)
            found = match.where(rescued, found)  # (N,)
        return found

    def __repr__(self) -> str:
        return (
            f"IoUMatcher(positive={self.positive}, negative={self.negative}, "
            f"allow_low_quality={self.allow_low_quality}, lowest={self.lowest})"
        )
