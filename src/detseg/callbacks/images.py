"""Pictures of validation: truth beside prediction, in the run's directory and with whichever loggers there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import lightning as L
import numpy as np

from detseg import visualize
from detseg.callbacks.overlays import Shown, last_step, send
from detseg.lettering import Picture
from detseg.structures import Batch, Detections, SemanticMap

WIDEST = 960
"""Pixels of a truth-and-prediction pair; wider ones are made smaller."""


class ImageLogger(L.Callback):
    """Draw the same few validation images each time: ground truth beside prediction.

    One sheet per epoch goes to ``dirpath/val_epoch_003.png`` (``val.png`` and ``test.png`` outside training), to
    TensorBoard as an image and to MLflow as an artifact. Weights & Biases gets the images with boxes and masks as its
    own overlays, which its dashboard can switch and filter. Drawn on the first rank alone.

    Args:
        dirpath: directory of the sheets; ``None`` is ``pictures`` in the trainer's root directory.
        images: how many images, from the start of the split; 0 draws nothing.
        every_n_epochs: epochs between two sheets; the last epoch is always drawn.
        min_score: detections below this score are left out.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path | None = None,
        images: int = 8,
        every_n_epochs: int = 1,
        min_score: float = 0.3,
    ) -> None:
        if images < 0 or every_n_epochs < 1:
            raise ValueError(
                f"ImageLogger: images={images} must be at least 0, every_n_epochs={every_n_epochs} at least 1"
            )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.images, self.every_n_epochs, self.min_score = images, every_n_epochs, min_score
        self._shown: list[Shown] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images with the step's predictions."""
        if outputs is not None and self._due(trainer):
            self._keep(outputs, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images with the step's predictions."""
        if outputs is not None and self._due(trainer):
            self._keep(outputs, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what was kept."""
        self._draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what was kept."""
        self._draw(trainer, pl_module, "test")

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero or len(self._shown) >= self.images:
            return False
        epoch = trainer.current_epoch + 1
        return not _fitting(trainer) or epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs

    def _keep(self, outputs: Sequence[Detections | SemanticMap], batch: Batch) -> None:
        for row in range(min(len(batch), self.images - len(self._shown))):
            height, width = batch.sizes[row].tolist()
            target, found = batch.targets[row], outputs[row]
            if isinstance(found, SemanticMap):
                found = found.resize((height, width))
            elif batch.truths is not None and batch.truths[row].size != (0, 0):
                found = found.resize(batch.truths[row].size, (height, width))  # the step speaks the photo's own pixels
            image = visualize.to_picture(batch.images[row, :, :height, :width])
            self._shown.append(Shown(image, target.cpu(), found.cpu()))

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        shown, self._shown = self._shown, []
        if not shown:
            return
        names: list[str] = list(cast(Any, module).class_names)
        sheet = visualize.contact_sheet([pair(item, names, self.min_score) for item in shown], columns=2, gap=8)
        directory = self.dirpath or Path(trainer.default_root_dir) / "pictures"
        name = f"{stage}_epoch_{trainer.current_epoch:03d}.png" if _fitting(trainer) else f"{stage}.png"
        path = visualize.save(sheet, directory / name)
        for logger in trainer.loggers:
            send(logger, f"{stage}/pictures", sheet, path, shown, names, last_step(trainer), self.min_score)


def pair(item: Shown, class_names: Sequence[str], min_score: float) -> Picture:
    """Return truth and prediction side by side, at most ``WIDEST`` pixels wide."""
    scale = visualize.legible_scale(*item.image.shape[:2])
    truth = visualize.draw_target(item.image, item.target, class_names, scale=scale)
    if isinstance(item.found, SemanticMap):
        found = visualize.draw_semantic(item.image, item.found, class_names, scale=scale)
    else:
        found = visualize.draw_detections(item.image, item.found, class_names, min_score=min_score, scale=scale)
    both = visualize.side_by_side(truth, found)
    if both.shape[1] <= WIDEST:
        return both
    size = (WIDEST, round(both.shape[0] * WIDEST / both.shape[1]))
    return np.asarray(cv2.resize(both, size, interpolation=cv2.INTER_AREA), np.uint8)


def _fitting(trainer: L.Trainer) -> bool:
    return trainer.state.fn == "fit"
