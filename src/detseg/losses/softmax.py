"""Softmax cross entropy of references whose first class is background: SSD's confidence loss.

Liu et al., SSD: Single Shot MultiBox Detector, 2016, arXiv:1512.02325, equation 3, reference by reference: which of
them count is the sampler's affair (``targets.samplers.HardNegativeMining``).

Letters: K classes, besides which there is background.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def softmax_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of each reference ``(...)``, in float32 or wider.

    Args:
        logits: ``(..., K + 1)``, those of background first.
        labels: ``(...)`` int64: 0..K-1, or negative for background.
        label_smoothing: share of the truth that is spread evenly over the K + 1, in [0, 1).

    Raises:
        ValueError: the shapes disagree.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"softmax_loss: logits, labels have shapes {tuple(logits.shape)}, {tuple(labels.shape)}; they must be "
            "(..., K + 1) and (...)"
        )
    wide = logits.flatten(0, -2) if logits.itemsize >= 4 else logits.flatten(0, -2).float()  # (R, K + 1)
    truth = (labels.flatten() + 1).clamp(min=0)  # (R,)
    return F.cross_entropy(wide, truth, reduction="none", label_smoothing=label_smoothing).view(labels.shape)


class SoftmaxLoss(nn.Module):
    """The cross entropy with its number; see ``softmax_loss``.

    Args:
        label_smoothing: share of the truth that is spread evenly over the classes and background; 0 in the paper.

    Raises:
        ValueError: it lies outside [0, 1).
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"SoftmaxLoss: label_smoothing is {label_smoothing}; it must lie in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each reference ``(...)`` from ``(..., K + 1)``; see ``softmax_loss``."""
        return softmax_loss(logits, labels, label_smoothing=self.label_smoothing)
