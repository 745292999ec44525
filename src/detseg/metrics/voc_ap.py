"""Pascal VOC average precision, as the development kit's ``VOCevaldet.m`` defines it (Everingham et al., IJCV 2010).

Built: the 11-point form of VOC 2007 and the area form of VOC 2010 and later. A detection belongs to the object of its
class that it overlaps most, whether or not that one is found already: the best-scored detection of an object is true,
all others are false. Objects marked ``difficult`` are neither found nor missed, and what lies on them does not count.

What differs from the kit:
- the 11 levels of recall are compared in whole numbers (see ``curves.eleven_point_precision``);
- coordinates are edges by default. The kit's are 1-based pixels inside the object, hence its ``+ 1`` in widths. A box
  read as ``[xmin - 1, ymin - 1, xmax, ymax]`` has edges and needs none; a box that kept the kit's numbers needs
  ``inclusive=True``;
- crowd regions, which VOC has not, are treated as difficult.

Letters: N detections, G objects, K classes, n detections of one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from detseg.metrics.base import Array, Figures, mean_or_nan
from detseg.metrics.curves import area_precision, eleven_point_precision
from detseg.metrics.overlaps import Pairs, box_pairs
from detseg.metrics.scene import Found, SceneMetric, Truth
from detseg.structures import Detections, Target


class VocAP(SceneMetric):
    """VOC mean average precision over an epoch; the same on any number of processes.

    ``compute`` gives ``map``, ``map_per_class`` ``(K,)``, ``count`` and ``count_per_class`` ``(K,)``, the objects that
    are not difficult. A class without such objects is NaN and stays out of the mean.

    Args:
        style: ``"2007"`` for 11 points, ``"2010"`` for the area under the curve.
        iou_threshold: least overlap, reached or passed.
        inclusive: whether the second corner is the last pixel inside (see the head of this file).
        class_names: names by label; labels must then lie below their number.
        num_classes: the number of classes where there are no names.

    Raises:
        ValueError: NaN, infinity or a label outside the range (names the image), or an image id that came twice.
    """

    def __init__(
        self,
        *,
        style: Literal["2007", "2010"] = "2010",
        iou_threshold: float = 0.5,  # the challenge's
        inclusive: bool = False,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, class_names=class_names)
        if style not in ("2007", "2010"):
            raise ValueError(f"style is {style!r}; it must be '2007' (11 points) or '2010' (area)")
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in (0, 1]")
        self.style = style
        self.iou_threshold = iou_threshold
        self.inclusive = inclusive

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            detections: one per image, in the pixels of its target.
            targets: one per image, each with its own ``image_id``.
        """
        self.keep_scene(detections, targets, areas=None)

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        found, truth, _ = self.scene()
        precision, count = voc_precision(
            found,
            truth,
            num_classes=self.classes(found, truth),
            style=self.style,
            iou_threshold=self.iou_threshold,
            inclusive=self.inclusive,
        )
        values: dict[str, Any] = {"map": mean_or_nan(precision), "map_per_class": precision}
        return self.figures(values | {"count": int(count.sum()), "count_per_class": count})


def voc_precision(
    found: Found,
    truth: Truth,
    *,
    num_classes: int,
    style: str = "2010",
    iou_threshold: float = 0.5,
    inclusive: bool = False,
) -> tuple[Array, Array]:
    """Return the average precision of each class.

    Args:
        found: detections, sorted by image.
        truth: objects, sorted by image.
        num_classes: K; labels lie below it.
        style: see ``VocAP``.
        iou_threshold: see ``VocAP``.
        inclusive: see ``VocAP``.

    Returns:
        ``(K,)`` float64, NaN where a class has no object that counts, and ``(K,)`` int64, how many it has.
    """
    found = found.take(np.lexsort((-found.score, found.label)))
    pairs = box_pairs(
        found.box,
        found.image * num_classes + found.label,
        truth.box,
        truth.image * num_classes + truth.label,
        np.zeros(len(truth.label), dtype=bool),
        minimum=iou_threshold,
        pixel=float(inclusive),
    )
    spared = truth.difficult | truth.crowd
    true, ignored = _verdicts(pairs, spared, len(found.label))
    count = np.bincount(truth.label[~spared], minlength=num_classes)
    start = np.searchsorted(found.label, np.arange(num_classes + 1))
    summarise = eleven_point_precision if style == "2007" else area_precision
    precision = np.full(num_classes, np.nan)
    for k in np.flatnonzero(count):
        mine = slice(start[k], start[k + 1])
        hits, misses = true[mine].cumsum(), (~true[mine] & ~ignored[mine]).cumsum()
        precision[k] = summarise(hits, misses, int(count[k]))
    return precision, count


def _verdicts(pairs: Pairs, spared: Array, number: int) -> tuple[Array, Array]:
    """Return which of the N detections, best score first within a class, are true and which do not count.

    Args:
        pairs: detections and objects that overlap enough.
        spared: ``(G,)`` bool, objects that are neither found nor missed.
        number: N.
    """
    # Each detection's object: the highest IoU, of equal ones the first (the kit replaces on `>` alone).
    order = np.lexsort((pairs.truth, -pairs.iou, pairs.detection))
    detection, at = np.unique(pairs.detection[order], return_index=True)
    truth = pairs.truth[order][at]
    true, ignored = np.zeros((2, number), dtype=bool)
    ignored[detection[spared[truth]]] = True
    detection, truth = detection[~spared[truth]], truth[~spared[truth]]
    _, first = np.unique(truth, return_index=True)  # detections ascend, so the first is the best-scored
    true[detection[first]] = True
    return true, ignored
