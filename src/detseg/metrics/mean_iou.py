"""Figures of semantic segmentation, all from one confusion matrix over the whole data set.

The IoU of a class is intersection over union of its pixels over all images, as in VOC (Everingham et al., 2010) and
FCN (Long et al., 2015), never a mean of per-image IoUs. What differs from torchmetrics' ``MulticlassJaccardIndex``: a
class that the truth never shows is n/a (NaN) and stays out of the mean, also where it was predicted; there it counts
as 0. Its false pixels lower the other classes' IoU in both.

Letters: K classes; rows of the matrix are truth, columns are predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detseg.metrics.base import DictMetric, Figures
from detseg.metrics.scene import class_count
from detseg.structures import SemanticMap, Target
from detseg.structures.maps import IGNORE_INDEX


class MeanIoU(DictMetric):
    """Mean IoU, Dice and accuracies over an epoch; the same on any number of processes.

    ``compute`` gives float64 scalars ``miou``, ``dice``, ``pixel_accuracy``, ``mean_class_accuracy``, ``fw_iou`` (IoU
    weighted by the classes' share of pixels); ``(K,)`` tensors ``iou_per_class``, ``dice_per_class``,
    ``accuracy_per_class``; ``count``, ``count_per_class``, the pixels of truth; and ``confusion`` ``(K, K)`` itself.
    NaN where there are no pixels.

    Args:
        num_classes: K, background included where it is a class.
        ignore_index: pixels of this label in the truth do not count.
        class_names: names by label; their number must be K.
    """

    confusion: Tensor

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        count = class_count(num_classes, class_names)
        if count is None or count < 1:
            raise ValueError(f"MeanIoU needs num_classes >= 1 or class_names, got {num_classes} and {class_names}")
        self.num_classes = count
        self.ignore_index = ignore_index
        self.class_names = None if class_names is None else list(class_names)
        self.add_state("confusion", torch.zeros((count, count), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: list[SemanticMap], targets: list[Target]) -> None:
        """Add a batch of images.

        Args:
            predictions: one per image, at the size of its truth.
            targets: one per image, with ``semantic``.

        Raises:
            ValueError: a map is missing, sizes differ, or a label is outside 0..K-1; the message names the image.
        """
        truths = truths_of(predictions, targets)
        if not truths:
            return
        predicted = torch.cat([found.labels.flatten() for found in predictions]).to(self.device)
        truth = torch.cat([labels.flatten() for labels in truths]).to(self.device)
        try:
            self.confusion += confusion_matrix(predicted, truth, self.num_classes, self.ignore_index)
        except ValueError:
            for found, target, labels in zip(predictions, targets, truths, strict=True):
                self._blame(target, found.labels.to(labels.device), labels)
            raise

    def compute(self) -> Figures:
        """Return the figures named in the class's docstring."""
        matrix = self.confusion.cpu()
        return self.figures(segmentation_figures(matrix) | {"confusion": matrix})

    def _blame(self, target: Target, predicted: Tensor, truth: Tensor) -> None:
        try:
            confusion_matrix(predicted, truth, self.num_classes, self.ignore_index)
        except ValueError as error:
            raise ValueError(f"{where(target)}: {error}") from None


def where(target: Target) -> str:
    """Return what a message calls an image: its id, and its file where it has one."""
    return f"image {target.image_id}" + (f" ({target.file})" if target.file else "")


def truths_of(predictions: Sequence[SemanticMap], targets: Sequence[Target]) -> list[Tensor]:
    """Return the labels of each target ``(H, W)``, checked against the size of its prediction.

    Raises:
        ValueError: there are not as many predictions as targets, or a target has no map or another size; the message
            names the image.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"there are predictions of {len(predictions)} images, but targets of {len(targets)}")
    return [_truth(found, target) for found, target in zip(predictions, targets, strict=True)]


def _truth(prediction: SemanticMap, target: Target) -> Tensor:
    if target.semantic is None:
        raise ValueError(f"{where(target)}: the target has no semantic map; read the data with truth='semantic'")
    if prediction.size != target.semantic.size:
        raise ValueError(
            f"{where(target)}: the prediction is {prediction.size}, the truth {target.semantic.size} (height, width); "
            "resize the prediction to the truth"
        )
    return target.semantic.labels


def confusion_matrix(predicted: Tensor, truth: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels by truth and prediction with one bincount.

    Args:
        predicted: int64 labels of any shape, in 0..K-1 wherever the truth counts.
        truth: int64 labels of the same shape, in 0..K-1 or ``ignore_index``.
        num_classes: K.
        ignore_index: truth that does not count.

    Returns:
        ``(K, K)`` int64, rows truth, columns prediction.

    Raises:
        ValueError: a label is outside the range.
    """
    ignored = truth == ignore_index
    low, high = (int(end) for end in predicted.aminmax()) if predicted.numel() else (0, 0)
    if low < 0 or high >= num_classes:  # perhaps where nothing counts
        check_labels("prediction", predicted[~ignored], num_classes, ignore_index)
        predicted = predicted.masked_fill(ignored, 0)
    known = truth.masked_fill(ignored, 0)
    check_labels("truth", known, num_classes, ignore_index)
    cells = known.mul_(num_classes).add_(predicted).masked_fill_(ignored, num_classes**2)  # the last one is left out
    counts = torch.bincount(cells.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes)


def check_labels(name: str, labels: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Refuse labels outside 0..K-1; none of them is the ignore index.

    Raises:
        ValueError: one is; the message says which, and calls the labels by ``name``.
    """
    if labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the {name} holds label {low if low < 0 else high}; it must be 0..{num_classes - 1}, "
            f"or {ignore_index} in the truth where a pixel does not count"
        )


def segmentation_figures(confusion: Tensor) -> dict[str, Any]:
    """Return all figures of a confusion matrix ``(K, K)``, rows truth, by the names in ``MeanIoU``.

    Notation of FCN (Long et al., 2015), section 5: n_ij pixels of class i predicted as j, t_i = sum_j n_ij.
    """
    right = confusion.diagonal().double()  # (K,) n_ii
    truth = confusion.sum(dim=1).double()  # (K,) t_i
    predicted = confusion.sum(dim=0).double()  # (K,)
    known = truth > 0
    nowhere = torch.full_like(truth, float("nan"))
    iou = torch.where(known, right / (truth + predicted - right), nowhere)
    dice = torch.where(known, 2 * right / (truth + predicted), nowhere)
    accuracy = torch.where(known, right / truth, nowhere)
    share = truth / truth.sum()
    return {
        "miou": iou[known].mean(),
        "dice": dice[known].mean(),
        "pixel_accuracy": right.sum() / truth.sum(),
        "mean_class_accuracy": accuracy[known].mean(),
        "fw_iou": (share * iou)[known].sum() if bool(known.any()) else nowhere.sum(),
        "iou_per_class": iou,
        "dice_per_class": dice,
        "accuracy_per_class": accuracy,
        "count": confusion.sum(),
        "count_per_class": confusion.sum(dim=1),
    }
