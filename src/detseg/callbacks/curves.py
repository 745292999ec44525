"""Precision over recall, recall over proposals, the confusion matrix: pictures of what the metrics counted anyway.

COCO's curves (Lin et al., "Microsoft COCO", 2014): 101 levels of recall, interpolated precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
from torch import Tensor

from detseg import visualize
from detseg.callbacks.overlays import last_step, send_picture
from detseg.lettering import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
MOST_CURVES = 10
"""With more classes, their curves are grey and only the mean has a name."""
MOST_NUMBERS = 20
"""With more classes, the matrix shows colours without numbers."""
SHOWN_POINTS = (10, 100, 300, 1000, 2000)
"""Numbers of proposals whose recall over IoU is drawn, where they were counted."""
CURVES = {"box": "boxes", "mask": "masks"}
"""Metric with ``precision_50`` -> what it compares."""


class Curves(L.Callback):
    """Draw precision over recall and the confusion matrix of a split.

    They go to ``dirpath/val_epoch_009_pr_box.png``, ``..._pr_mask.png``, ``..._confusion.png`` and, where a model has
    proposals, ``..._proposals.png``, and to every logger that takes pictures. Outside training the names have no epoch.
    Drawn on the first rank alone.

    Args:
        dirpath: directory of the pictures; ``None`` is ``pictures`` in the trainer's root directory.
        every_n_epochs: epochs between two drawings; the last figures of a run are always drawn.
    """

    def __init__(self, *, dirpath: str | Path | None = None, every_n_epochs: int = 10) -> None:
        if every_n_epochs < 1:
            raise ValueError(
                f"Curves: every_n_epochs={every_n_epochs} must be at least 1; callbacks.curves=null is none"
            )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self._waiting = False  # whether there are figures that nobody has drawn

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw where it is due."""
        if trainer.sanity_checking:
            return
        self._waiting = True
        if not fitting(trainer) or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, "val")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last figures, if they are not drawn yet."""
        if self._waiting:
            self._draw(trainer, pl_module, "val", epoch=trainer.current_epoch - 1)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the test split's."""
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, stage: str, *, epoch: int | None = None) -> None:
        self._waiting = False
        tables = getattr(module, "tables", {}).get(stage)
        if not tables or not trainer.is_global_zero:
            return
        directory = self.dirpath or Path(trainer.default_root_dir) / "pictures"
        epoch = trainer.current_epoch if epoch is None else epoch
        prefix = f"{stage}_epoch_{epoch:03d}" if fitting(trainer) else stage
        for name, picture in pictures(tables, list(cast(Any, module).class_names)).items():
            path = visualize.save(picture, directory / f"{prefix}_{name}.png")
            for logger in trainer.loggers:
                send_picture(logger, f"{stage}/{name}", picture, path, last_step(trainer))


def fitting(trainer: L.Trainer) -> bool:
    """Say whether the trainer trains, rather than validates or tests alone."""
    return trainer.state.fn == "fit"


def pictures(tables: Mapping[str, Mapping[str, Tensor]], class_names: Sequence[str]) -> dict[str, Picture]:
    """Return what can be drawn of the metrics' values: ``pr_box``, ``pr_mask``, ``confusion``, ``proposals``.

    Args:
        tables: what each metric computed, by the metric's name.
        class_names: by label.
    """
    drawn = {}
    for name, values in tables.items():
        if name in CURVES and "precision_50" in values:
            drawn[f"pr_{name}"] = precision_recall(_array(values["precision_50"]), class_names, what=CURVES[name])
        if "confusion" in values:
            matrix = _array(values["confusion"])
            detected = len(matrix) == len(class_names) + 1
            names = [*class_names, visualize.BACKGROUND] if detected else class_names
            drawn["confusion"] = confusion(matrix, names, unit="objects" if detected else "pixels")
        if "recall_points" in values:
            drawn["proposals"] = proposal_recall(_array(values["recall_points"])[:, 0], _array(values["recall"]))
    return drawn


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().cpu().numpy())


def precision_recall(precision: Array, class_names: Sequence[str], *, what: str = "boxes") -> Picture:
    """Draw precision over recall at IoU 0.5, one curve per class and their mean.

    Args:
        precision: ``(K, 101)`` at recall 0, 0.01, ..., 1; rows of NaN are classes without objects.
        class_names: K names.
        what: what is compared, for the title.
    """
    figure = _figure(6.4, 4.8)
    axes = figure.subplots()
    known = ~np.isnan(precision).any(axis=1)
    recall = np.linspace(0.0, 1.0, precision.shape[1])
    few = int(known.sum()) <= MOST_CURVES
    for label in np.flatnonzero(known).tolist():
        colour = np.array(visualize.colour(label)) / 255 if few else "0.8"
        name = f"{class_names[label]} {precision[label].mean():.3f}" if few else None
        axes.plot(recall, precision[label], color=colour, linewidth=1.5 if few else 0.8, label=name)
    if known.any():
        mean = precision[known].mean(axis=0)
        axes.plot(recall, mean, color="black", linewidth=2, linestyle="--", label=f"mean {mean.mean():.3f}")
        axes.legend(title="AP at IoU 0.5", loc="best", fontsize="small", title_fontsize="small")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=f"Precision over recall, {what}")
    axes.grid(alpha=0.3)
    return _rendered(figure)


def proposal_recall(points: Array, recall: Array) -> Picture:
    """Draw how many objects proposals cover: over their number at some IoUs, and over the IoU at some numbers.

    As in Hosang et al., "What makes for effective detection proposals?", 2015, figures 6 and 7.

    Args:
        points: ``(P,)`` numbers of proposals per image, ascending.
        recall: ``(P, 10)`` at IoU 0.5, 0.55, ..., 0.95.
    """
    figure = _figure(10.5, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    thresholds = np.linspace(0.5, 0.95, recall.shape[1])
    for column in (0, 4, 8):
        left.plot(points, recall[:, column], marker=".", label=f"IoU {thresholds[column]:.1f}")
    left.plot(points, recall.mean(axis=1), color="black", linestyle="--", label="average (AR)")
    left.set(xscale="log", xlabel="proposals per image", ylabel="recall", title="Recall over proposals", ylim=(0, 1.02))
    for row in [row for row, point in enumerate(points.tolist()) if point in (*SHOWN_POINTS, points[-1])]:
        right.plot(thresholds, recall[row], marker=".", label=f"{points[row]} proposals, AR {recall[row].mean():.3f}")
    right.set(xlabel="IoU with the object", title="Recall over IoU")
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return _rendered(figure)


def confusion(matrix: Array, names: Sequence[str], *, unit: str = "objects") -> Picture:
    """Draw a confusion matrix, coloured by the share of each row, with the counts in the cells.

    Args:
        matrix: ``(K, K)`` int64, rows truth, columns predictions.
        names: K names.
        unit: what is counted.
    """
    count = len(names)
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    side = min(12.0, 3.2 + 0.62 * count)
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= MOST_NUMBERS:
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(count), names)
        for row, column in np.ndindex(count, count):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, short(int(matrix[row, column])), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="prediction", ylabel="truth", title=f"Confusion, {unit}")
    figure.colorbar(image, label="share of the row", shrink=0.8)
    return _rendered(figure)


def short(number: int) -> str:
    """Return a count in at most five characters: 950, 12.3k, 4.56M."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, without pyplot: that would ask for a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _rendered(figure: Figure) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
