"""The callback that writes what was found during an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from detseg.results import result_rows, write_map
from detseg.structures import Batch, SemanticMap


class PredictionWriter(L.Callback):
    """Gather predictions in the photos' own pixels and write ``predictions.json`` at the end.

    Detections become COCO results. A semantic map becomes ``predictions/<image id>.png`` with a row of its name.
    For one process: several would write the same file.

    Args:
        directory: where the files go.
        category_ids: the data set's own ids by label.
    """

    def __init__(self, *, directory: Path, category_ids: Sequence[int]) -> None:
        self.directory, self.category_ids = Path(directory), list(category_ids)
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse several processes.

        Raises:
            ValueError: the trainer has more than one.
        """
        if trainer.world_size > 1:
            raise ValueError(f"predictions are written by one process, not {trainer.world_size}; set trainer.devices=1")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the step's predictions."""
        for found, truth in zip(outputs, batch.truths or batch.targets, strict=True):
            if isinstance(found, SemanticMap):
                name = write_map(found, self.directory / "predictions" / f"{truth.image_id}.png")
                self.rows.append({"image_id": truth.image_id, "file": truth.file, "map": name})
            else:
                self.rows += result_rows(found, category_ids=self.category_ids, image_id=truth.image_id)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "predictions.json").write_text(json.dumps(self.rows), encoding="utf-8")

    on_test_end = on_validation_end
