"""Pictures on their way to a dashboard, in the form that each logger knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from detseg.lettering import Picture
from detseg.structures import Detections, SemanticMap, Target


class Shown(NamedTuple):
    """One image with what is true and what was found, all in the pixels of ``image`` and in host memory."""

    image: Picture
    target: Target
    found: Detections | SemanticMap


def send(
    logger: Logger,
    tag: str,
    sheet: Picture,
    path: Path,
    shown: Sequence[Shown],
    class_names: Sequence[str],
    step: int,
    min_score: float,
) -> None:
    """Hand the pictures to a logger in the form that it knows; other loggers, such as CSV, get nothing.

    Args:
        logger: TensorBoard, Weights & Biases, MLflow or another one.
        tag: name of the pictures on the dashboard.
        sheet: all pairs in one picture.
        path: file that the sheet was written to.
        shown: the same images, for overlays.
        class_names: by label.
        step: see ``last_step``.
        min_score: detections below this score are left out.
    """
    if isinstance(logger, WandbLogger):
        logger.log_image(
            tag, [item.image for item in shown], step=step, **wandb_overlays(shown, class_names, min_score)
        )
    else:
        send_picture(logger, tag, sheet, path, step)


def send_picture(logger: Logger, tag: str, picture: Picture, path: Path, step: int) -> None:
    """Hand one picture to a logger that knows pictures.

    Args:
        logger: TensorBoard, Weights & Biases, MLflow or another one.
        tag: name of the picture on the dashboard.
        picture: itself.
        path: file that it was written to.
        step: see ``last_step``.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, picture, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), artifact_path="pictures")
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, [picture], step=step)


def last_step(trainer: L.Trainer) -> int:
    """Return the number of the last step, from 0, at which the figures of a validation stand too.

    One later would count as done after the checkpoint that follows, and be dropped by a run that goes on from it.
    """
    return max(0, trainer.global_step - 1)


def wandb_overlays(shown: Sequence[Shown], class_names: Sequence[str], min_score: float) -> dict[str, list[Any]]:
    """Return boxes and masks of truth and prediction as ``wandb.Image`` takes them, one entry per image.

    Masks are maps of classes: a semantic map as it is, instances as their label + 1 over a background of 0.

    Returns:
        ``captions``, and ``boxes`` or ``masks`` or both, where the images have them.
    """
    overlays: dict[str, list[Any]] = {"caption": [item.target.file or str(item.target.image_id) for item in shown]}
    boxes, masks = [], []
    for item in shown:
        found = item.found
        if isinstance(found, Detections):
            found = found[found.scores >= min_score]
            boxes.append({"ground_truth": _boxes(item.target, class_names), "prediction": _boxes(found, class_names)})
        pairs = {"ground_truth": _map(item.target, class_names), "prediction": _map(found, class_names)}
        masks.append({name: value for name, value in pairs.items() if value is not None})
    if boxes:
        overlays["boxes"] = boxes
    if any(masks):
        overlays["masks"] = masks
    return overlays


def _boxes(objects: Target | Detections, class_names: Sequence[str]) -> dict[str, Any]:
    scores = objects.scores.tolist() if isinstance(objects, Detections) else None
    data = []
    for row, (corners, label) in enumerate(zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)):
        box = {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), corners, strict=True)),
            "domain": "pixel",
            "class_id": label,
            "box_caption": class_names[label],
        }
        if scores is not None:
            box["box_caption"] += f" {scores[row]:.2f}"
            box["scores"] = {"score": scores[row]}
        data.append(box)
    return {"box_data": data, "class_labels": dict(enumerate(class_names))}


def _map(item: Target | Detections | SemanticMap, class_names: Sequence[str]) -> dict[str, Any] | None:
    semantic = item if isinstance(item, SemanticMap) else getattr(item, "semantic", None)
    if semantic is not None:
        labels = dict(enumerate(class_names)) | {semantic.ignore_index: "no class"}
        return {"mask_data": semantic.labels.numpy().astype(np.uint8), "class_labels": labels}
    masks = cast("Target | Detections", item).masks
    if masks is None:
        return None
    area = np.zeros(tuple(masks.shape[1:]), np.uint8)
    for mask, label in zip(masks.numpy()[::-1], item.labels.tolist()[::-1], strict=True):  # the first on top
        area[mask] = label + 1
    return {"mask_data": area, "class_labels": {0: "background"} | {k + 1: n for k, n in enumerate(class_names)}}
