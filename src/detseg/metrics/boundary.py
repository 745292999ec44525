"""How well the borders of a semantic map are drawn: boundary IoU and boundary F.

Boundary IoU: Cheng, Girshick, Dollár, Berg & Kirillov, 2021 (arXiv:2103.16562), equation 1: the IoU of those pixels of
truth and prediction that lie within a distance d of their contours. Boundary F: Csurka, Larlus & Perronnin, 2013, "What
is a Good Evaluation Measure for Semantic Segmentation?" (doi 10.5244/C.27.32), section 3: precision and recall of
contour pixels, each right where the other map has a contour of the class no farther than a tolerance. Differs: both are
counted over the whole split, as the mean IoU is, not per image; distances of boundary IoU are Chebyshev's, as in its
released code, those of F Euclidean; the image's own edge is no border. Neither is a pixel that does not count, whatever
is predicted there, so that a data set whose objects are framed by such pixels has no contours for F; the bands of
boundary IoU reach across a frame that is narrower than d.

Letters: K classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from detseg.metrics.base import Array, DictMetric, Figures
from detseg.metrics.mean_iou import check_labels, truths_of, where
from detseg.structures import SemanticMap, Target
from detseg.structures.maps import IGNORE_INDEX


class BoundaryQuality(DictMetric):
    """Boundary IoU and boundary F over an epoch; the same on any number of processes.

    ``compute`` gives float64 scalars ``boundary_iou`` and ``boundary_f``, the means over classes, and ``(K,)`` tensors
    ``boundary_iou_per_class`` and ``boundary_f_per_class``. NaN for a class whose truth has no pixel within the
    distance of another class, or no contour for F.

    Args:
        class_names: names by label; their number is K.
        width: distance d of boundary IoU as a share of the image's diagonal; 0.02 in the paper, at least one pixel.
        tolerance: of boundary F, likewise; 0.0075 in Csurka et al.

    Raises:
        ValueError: there are no classes, or a share is not in (0, 1).
    """

    overlap: Tensor
    joined: Tensor
    wanted: Tensor
    hits: Tensor
    contours: Tensor

    def __init__(self, *, class_names: Sequence[str], width: float = 0.02, tolerance: float = 0.0075) -> None:
        super().__init__()
        if not class_names or not 0 < width < 1 or not 0 < tolerance < 1:
            raise ValueError(
                f"BoundaryQuality: {len(class_names)} classes, width={width}, tolerance={tolerance}; give at least one "
                "class and shares of the image's diagonal between 0 and 1"
            )
        self.class_names, self.width, self.tolerance = list(class_names), width, tolerance
        count = len(self.class_names)
        for name in ("overlap", "joined", "wanted"):  # of the bands; wanted: the truth's
            self.add_state(name, torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("hits", "contours"):  # rows: of the prediction, of the truth
            self.add_state(name, torch.zeros(2, count, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: list[SemanticMap], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            predictions: one per image, at the size of its truth.
            targets: one per image, with ``semantic``.

        Raises:
            ValueError: a map is missing, sizes differ, or a label is outside 0..K-1; the message names the image.
        """
        for found, target, labels in zip(predictions, targets, truths_of(predictions, targets), strict=True):
            truth, guess = labels.cpu(), found.labels.cpu()  # (H, W) each
            counted = truth != IGNORE_INDEX  # (H, W)
            try:
                check_labels("truth", truth[counted], len(self.class_names))
                check_labels("prediction", guess, len(self.class_names))
            except ValueError as error:
                raise ValueError(f"{where(target)}: {error}") from None
            if truth.numel():
                guess = guess.where(counted, IGNORE_INDEX)  # or what is predicted there would make borders beside it
                self._count_bands(guess, truth)
                self._count_contours(guess, truth)

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        iou = torch.where(self.wanted > 0, self.overlap.double() / self.joined, math.nan)  # (K,)
        precision, recall = (self.hits.double() / self.contours.clamp(min=1)).unbind(0)  # (K,) each
        fair = 2 * precision * recall / (precision + recall).clamp(min=1e-300)  # (K,)
        fair = torch.where(self.contours[1] > 0, fair, math.nan)
        return self.figures(
            {
                "boundary_iou": iou.nanmean(),
                "boundary_f": fair.nanmean(),
                "boundary_iou_per_class": iou,
                "boundary_f_per_class": fair,
            }
        )

    def _count_bands(self, guess: Tensor, truth: Tensor) -> None:
        distance = max(1, round(self.width * math.hypot(*truth.shape)))
        bands = [borders(labels, distance) for labels in (guess, truth)]  # (H, W) bool each
        both = bands[0] & bands[1] & (guess == truth)
        sizes = [self._by_class(labels, band) for labels, band in zip((guess, truth), bands, strict=True)]  # (K,) each
        shared = self._by_class(truth, both)  # (K,)
        self.overlap += shared.to(self.device)
        self.joined += (sizes[0] + sizes[1] - shared).to(self.device)
        self.wanted += sizes[1].to(self.device)

    def _count_contours(self, guess: Tensor, truth: Tensor) -> None:
        edges = [borders(labels, 1) for labels in (guess, truth)]  # (H, W) bool each
        reach = max(1.0, self.tolerance * math.hypot(*truth.shape))
        for label in range(len(self.class_names)):
            lines = [(edge & (labels == label)).numpy() for edge, labels in zip(edges, (guess, truth), strict=True)]
            for row, (own, other) in enumerate((lines, lines[::-1])):
                self.contours[row, label] += int(own.sum())
                if own.any() and other.any():
                    self.hits[row, label] += int((own & (_distance_to(other) <= reach)).sum())

    def _by_class(self, labels: Tensor, chosen: Tensor) -> Tensor:
        """Return how many chosen pixels each class has, ``(K,)``."""
        return torch.bincount(labels[chosen], minlength=len(self.class_names))


def borders(labels: Tensor, distance: int) -> Tensor:
    """Return which pixels ``(H, W)`` bool have another class no farther than ``distance`` rows and columns away.

    Args:
        labels: ``(H, W)`` int64; pixels of the ignore index are no class.
        distance: in pixels, 1 or more.
    """
    window = np.ones((2 * distance + 1, 2 * distance + 1), dtype=np.uint8)
    values = labels.numpy().astype(np.uint16)  # (H, W); OpenCV reads nothing beyond the image's edge
    nothing = values == IGNORE_INDEX
    highest = cv2.dilate(np.where(nothing, 0, values), window)  # (H, W)
    lowest = cv2.erode(np.where(nothing, np.iinfo(np.uint16).max, values), window)  # (H, W)
    return torch.from_numpy(((highest > values) | (lowest < values)) & ~nothing)


def _distance_to(pixels: Array) -> Array:
    """Return the Euclidean distance of every pixel to the nearest of those chosen, ``(H, W)`` float32."""
    return np.asarray(cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
