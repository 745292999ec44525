"""One linear SVM per class, its negatives mined from far more regions than fit in memory.

`"R-CNN" <https://arxiv.org/abs/1311.2524>`_, section 2.3 and appendix B (Girshick et al. 2014), after section 4.4 of
`"Object Detection with Discriminatively Trained Part-Based Models" <https://doi.org/10.1109/TPAMI.2009.167>`_
(Felzenszwalb et al. 2010). The numbers that the paper leaves open are those of the authors' release. Differs: the first
negatives are those of as many images as are needed, not of one, and a class keeps its multipliers from one solution to
the next.

Letters: K classes, N regions of an image, D features, P positives of a class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detseg.ops.linear_svm import fit_linear_svm

log = logging.getLogger(__name__)

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Reads the images anew: features ``(N, D)`` of regions, and for which class each is a negative, ``(N, K)`` bool."""


@dataclass
class ClassSVMs:
    """Machines of all classes; the margins of x are ``x @ weight.T + bias``.

    Attributes:
        weight: ``(K, D)``; zero for a class that has none.
        bias: ``(K,)``.
        known: ``(K,)`` bool, which classes have one.
    """

    weight: Tensor
    bias: Tensor
    known: Tensor


class HardNegativeSVM:
    """Fit linear SVMs with hard-negative mining.

    Args:
        cost: C of a negative; a positive's is ``positive_weight`` times that.
        positive_weight: see there.
        bias_scale: the value of the feature that carries the bias.
        norm: mean length to which features are scaled first, which gives ``cost`` its meaning.
        negative_iou: a region is a negative of a class if it overlaps each object of it by less than this IoU.
        start: negatives of a class that are taken as they come, before the first machine can say which are hard.
        hard_margin: a negative with a margin above this is hard and joins them.
        easy_margin: one with a margin below this leaves them after a solution.
        retrain_after: negatives that joined, after which a machine is solved anew.
        passes: over all images; fewer where nothing joins any more.
        tolerance: of the solver, see ``fit_linear_svm``.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        *,
        cost: float = 1e-3,
        positive_weight: float = 2.0,
        bias_scale: float = 10.0,
        norm: float = 20.0,
        negative_iou: float = 0.3,
        start: int = 2000,
        hard_margin: float = -1.0,
        easy_margin: float = -1.2,
        retrain_after: int = 2000,
        passes: int = 1,
        tolerance: float = 1e-3,
    ) -> None:
        if min(cost, positive_weight, bias_scale, norm, tolerance) <= 0 or min(start, retrain_after, passes) < 1:
            raise ValueError(
                f"HardNegativeSVM: cost={cost}, positive_weight={positive_weight}, bias_scale={bias_scale}, "
                f"norm={norm}, tolerance={tolerance} must be above 0; start={start}, retrain_after={retrain_after} and "
                f"passes={passes} at least 1"
            )
        if not 0 < negative_iou <= 1 or easy_margin > hard_margin:
            raise ValueError(
                f"HardNegativeSVM: negative_iou={negative_iou} must lie in (0, 1], and easy_margin={easy_margin} not "
                f"above hard_margin={hard_margin}, or what joins would leave at once"
            )
        self.cost, self.positive_weight, self.bias_scale = cost, positive_weight, bias_scale
        self.norm, self.negative_iou, self.tolerance = norm, negative_iou, tolerance
        self.start, self.retrain_after, self.passes = start, retrain_after, passes
        self.hard_margin, self.easy_margin = hard_margin, easy_margin

    def fit(self, positives: Sequence[Tensor], blocks: Blocks) -> ClassSVMs:
        """Return the machines; memory is that of the positives and of the negatives kept, in the blocks' type.

        Args:
            positives: per class ``(P, D)``, already of mean length ``norm`` as all features; a class with none gets no
                machine, nor does one without a single negative.
            blocks: the images' regions; every call reads them once more, in the same order.
        """
        classes = [Mined(rows) for rows in positives]
        width = positives[0].shape[1] if len(positives) else 0
        found = ClassSVMs(torch.zeros(len(classes), width), torch.zeros(len(classes)), torch.zeros(len(classes)).bool())
        for number in range(self.passes):
            joined = 0
            for index, (features, negative) in enumerate(blocks()):
                joined += self._look(classes, found, index, features, negative)
            self._solve(classes, found, range(len(classes)))
            kept = sum(len(mined.keys) for mined in classes)
            log.info(
                "SVMs, pass %d of at most %d: %d negatives joined, %d are kept", number + 1, self.passes, joined, kept
            )
            if joined == 0:
                break
        return found

    def _look(self, classes: Sequence[Mined], found: ClassSVMs, index: int, features: Tensor, negative: Tensor) -> int:
        """Let the hard negatives of one image join; return how many did, over all classes."""
        margins = features.float() @ found.weight.T + found.bias  # (N, K)
        joined, due = 0, []
        for label, mined in enumerate(classes):
            if len(mined.positives) == 0:
                continue
            hard = negative[:, label] & ((margins[:, label] > self.hard_margin) | ~found.known[label])  # (N,)
            joined += mined.add(index, hard.nonzero().flatten(), features)
            if mined.added >= (self.retrain_after if found.known[label] else self.start):
                due.append(label)
        self._solve(classes, found, due)
        return joined

    def _solve(self, classes: Sequence[Mined], found: ClassSVMs, labels: Iterable[int]) -> None:
        """Solve for some classes, and let easy negatives leave."""
        for label in labels:
            mined = classes[label]
            if len(mined.positives) == 0 or len(mined.keys) == 0 or (mined.added == 0 and bool(found.known[label])):
                continue
            rows = torch.cat([mined.positives, *mined.negatives]).float()  # (P + N', D)
            positive = torch.arange(len(rows)) < len(mined.positives)  # (P + N',)
            svm = fit_linear_svm(
                rows,
                positive,
                cost=self.cost,
                positive_weight=self.positive_weight,
                bias_scale=self.bias_scale,
                tolerance=self.tolerance,
                start=mined.dual,
            )
            found.weight[label], found.bias[label], found.known[label] = svm.weight, svm.bias, True
            margins = rows[len(mined.positives) :] @ svm.weight + svm.bias  # (N',)
            mined.keep(margins >= self.easy_margin, svm.dual)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"HardNegativeSVM({numbers})"


@dataclass
class Mined:
    """The examples of one class between two solutions.

    Attributes:
        positives: ``(P, D)``.
        negatives: blocks ``(n, D)`` in the order of ``keys``.
        keys: ``(N',)`` int64, image and row of each negative in one number.
        dual: ``(P + N',)`` multipliers of the last solution, 0 for what joined since.
        added: negatives since then.
    """

    positives: Tensor
    negatives: list[Tensor] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    dual: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    added: int = 0

    def __post_init__(self) -> None:
        self.dual = torch.zeros(len(self.positives), dtype=torch.float64)

    def add(self, index: int, rows: Tensor, features: Tensor) -> int:
        """Let some rows of an image's features join, but for those that are there; return how many did."""
        keys = rows + (index << 32)  # (n,)
        new = ~torch.isin(keys, self.keys)  # (n,)
        keys, count = keys[new], int(new.sum())
        if count:
            self.negatives.append(features[rows[new]])  # (n, D)
            self.keys = torch.cat([self.keys, keys])
            self.dual = torch.cat([self.dual, torch.zeros(count, dtype=torch.float64)])
            self.added += count
        return count

    def keep(self, wanted: Tensor, dual: Tensor) -> None:
        """Take the multipliers of a solution, and leave out all negatives but the ``wanted`` ones, ``(N',)`` bool."""
        self.negatives = [torch.cat(self.negatives)[wanted]]
        self.keys, self.added = self.keys[wanted], 0
        self.dual = torch.cat([dual[: len(self.positives)], dual[len(self.positives) :][wanted]])
