"""Soft-NMS of `"Soft-NMS - Improving Object Detection With One Line of Code" <https://arxiv.org/abs/1704.04503>`_.

Boxes that overlap a better one are not dropped: their scores fall with the overlap, by a line or a Gaussian curve
(section 3). Exact: boxes are taken one at a time, as in the paper's figure 2, see ``ops.suppress``. Differs: a box is
dropped at once when its score falls below ``score_threshold`` (the authors' code does so too; the paper keeps all), and
a box counts with its own class alone.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from detseg.ops.nms import check_share
from detseg.ops.suppress import Floats, Ints, on_host, suppress

METHODS = ("linear", "gaussian")


def linear_factor(row: Ints, iou: Floats, *, threshold: float) -> Floats:
    """Return what scores are multiplied by ``(P,)``: 1 - IoU where the IoU reaches the threshold, else 1 (section 3).

    Args:
        row: ``(P,)``, not read.
        iou: ``(P,)`` with the box that was taken.
        threshold: N_t of the paper.
    """
    return np.where(iou >= threshold, 1.0 - iou, 1.0)  # (P,)


def gaussian_factor(row: Ints, iou: Floats, *, sigma: float) -> Floats:
    """Return what scores are multiplied by ``(P,)``: exp(-IoU^2 / sigma) (section 3).

    Args:
        row: ``(P,)``, not read.
        iou: ``(P,)`` with the box that was taken.
        sigma: of the paper.
    """
    return np.exp(iou * iou / -sigma)  # (P,)


class SoftNMS:
    """Lower the scores of boxes that overlap better ones of their label.

    Computed on the host in float64: for tensors on a GPU it waits for them.

    Args:
        method: ``"gaussian"`` or ``"linear"``.
        sigma: of the Gaussian, above 0: at IoU 0.5 a score is multiplied by exp(-0.25 / sigma). The paper's 0.5.
        threshold: IoU from which the linear method lowers a score, in [0, 1]; the Gaussian does not read it. The
            paper's 0.3.
        score_threshold: boxes are dropped where their score is, or falls, below this; at least 0. Scores must be
            positive to stay. 0.001 as in the authors' code.
        class_agnostic: boxes of different labels lower each other too.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        *,
        method: str = "gaussian",
        sigma: float = 0.5,
        threshold: float = 0.3,
        score_threshold: float = 0.001,
        class_agnostic: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"SoftNMS: method is {method!r}; choose one of {', '.join(METHODS)}")
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"SoftNMS: sigma is {sigma}; it must be above 0, the paper's is 0.5")
        if not 0.0 <= score_threshold < math.inf:
            raise ValueError(f"SoftNMS: score_threshold is {score_threshold}; a score is at least 0")
        check_share("SoftNMS", threshold=threshold)
        self.method = method
        self.sigma = sigma
        self.threshold = threshold
        self.score_threshold = score_threshold
        self.class_agnostic = class_agnostic
        linear = method == "linear"
        self._factor = partial(linear_factor, threshold=threshold) if linear else partial(gaussian_factor, sigma=sigma)

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``(K,)`` and lowered scores ``(K,)``, best first; see ``Suppression``."""
        corners, values, classes = on_host("SoftNMS", boxes, scores, labels)
        classes = torch.zeros_like(classes) if self.class_agnostic else classes
        keep, lowered = suppress(corners, values, classes, self._factor, floor=self.score_threshold)
        return keep.to(boxes.device), lowered.to(scores)

    def __repr__(self) -> str:
        own = f"sigma={self.sigma}" if self.method == "gaussian" else f"threshold={self.threshold}"
        return (
            f"SoftNMS(method={self.method!r}, {own}, score_threshold={self.score_threshold}, "
            f"class_agnostic={self.class_agnostic})"
        )
