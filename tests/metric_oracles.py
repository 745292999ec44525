"""Slow and readable twins of the metrics, random cases, and pycocotools on the same numbers."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detseg.structures import Detections, Target

AREAS = ("small", "medium", "large")
TWELVE = ["map", "map_50", "map_75", *(f"map_{area}" for area in AREAS)]
TWELVE += ["mar_1", "mar_10", "mar_100", *(f"mar_{area}" for area in AREAS)]


@dataclass
class Case:
    """Detections and targets of some images."""

    detections: list[Detections]
    targets: list[Target]
    num_classes: int


def xywh(box: torch.Tensor) -> list[float]:
    """COCO's box from ours: corner and size in float64."""
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def to_coco(case: Case, kind: type[COCO] = COCO, *, masks: bool = False) -> tuple[COCO, COCO]:
    """Return the case as COCO objects: truth and results."""

    def encode(mask: torch.Tensor) -> dict[str, object]:
        return rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    objects, results = [], []
    for found, target in zip(case.detections, case.targets, strict=True):
        for n in range(len(target)):
            entry = {
                "id": len(objects) + 1,  # never 0: pycocotools takes 0 for "not matched"
                "image_id": target.image_id,
                "category_id": int(target.labels[n]) + 1,
                "bbox": xywh(target.boxes[n]),
                "area": float(target.area[n]),
                "iscrowd": int(target.iscrowd[n]),
            }
            if masks:
                entry["segmentation"] = encode(target.masks[n])
            objects.append(entry)
        for n in range(len(found)):
            entry = {
                "image_id": target.image_id,
                "category_id": int(found.labels[n]) + 1,
                "score": float(found.scores[n]),
            }
            # with a box beside it, loadRes would take the box's area
            entry |= {"segmentation": encode(found.masks[n])} if masks else {"bbox": xywh(found.boxes[n])}
            results.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = kind()
        truth.dataset = {
            "info": {},
            "images": [{"id": target.image_id, "height": 200, "width": 200} for target in case.targets],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(case.num_classes)],
            "annotations": objects,
        }
        truth.createIndex()
        if results:
            return truth, truth.loadRes(results)
        nothing = kind()
        nothing.dataset = truth.dataset | {"annotations": []}
        nothing.createIndex()
    return truth, nothing


def pycocotools_figures(case: Case, *, masks: bool = False) -> dict[str, float]:
    """Return the twelve figures of pycocotools, NaN for its -1."""
    truth, results = to_coco(case, masks=masks)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, results, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {key: np.nan if value == -1 else float(value) for key, value in zip(TWELVE, evaluation.stats, strict=True)}


def random_case(seed: int, *, masks: bool = False, tied: bool | None = None) -> Case:
    """Return a small, hard case: crowds, ties, empty images and classes, crowded images, all sizes of objects.

    Args:
        seed: everything is drawn from it.
        masks: whether objects and detections carry masks (blobs of 40 x 40 to 200 x 200 pixels).
        tied: whether scores come from a handful of values; ``None``: drawn.
    """
    random = np.random.default_rng(seed)
    classes = int(random.integers(1, 6))
    side = int(random.choice([40, 110, 200])) if masks else 200
    tied = bool(random.random() < 0.5) if tied is None else tied
    whole = random.random() < 0.3  # whole pixels make equal IoUs likely
    many = random.random() < 0.15  # beyond 100 detections of one class in one image
    ids = random.permutation(1000)[: int(random.integers(1, 8))]
    found, targets = [], []
    for image_id in ids:
        number = 0 if random.random() < 0.2 else int(random.integers(1, 9))
        boxes = draw_boxes(random, number, side, whole)
        labels = random.integers(0, classes, number)
        crowd = random.random(number) < 0.2
        total = 0 if random.random() < 0.15 else int(random.integers(100, 180) if many else random.integers(1, 30))
        guesses = draw_boxes(random, total, side, whole)
        guessed = random.integers(0, 1 if many else classes, total)
        if number:  # most guesses lie near an object
            near = random.random(total) < 0.7
            which = random.integers(0, number, total)
            jitter = random.normal(0, random.choice([0.0, 1.0, 4.0]), (total, 4))
            guesses = np.where(near[:, None], boxes[which] + (jitter.round() if whole else jitter), guesses)
            guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
            guessed = np.where(near & (random.random(total) < 0.8) & (not many), labels[which], guessed)
        scores = random.choice([0.2, 0.5, 0.9], total) if tied else random.random(total)
        target_masks = blobs(random, boxes, side) if masks else None
        area = None if masks else (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * random.uniform(0.5, 1)
        targets.append(
            Target(
                boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                labels=torch.tensor(labels, dtype=torch.int64),
                masks=target_masks,
                iscrowd=torch.tensor(crowd),
                area=None if area is None else torch.tensor(area, dtype=torch.float32),
                image_id=int(image_id),
                size=(side, side),
            )
        )
        found.append(
            Detections(
                boxes=torch.tensor(guesses, dtype=torch.float32).reshape(-1, 4),
                scores=torch.tensor(scores, dtype=torch.float32),
                labels=torch.tensor(guessed, dtype=torch.int64),
                masks=blobs(random, guesses, side) if masks else None,
            )
        )
    return Case(found, targets, classes)


def draw_boxes(random: np.random.Generator, number: int, side: int, whole: bool) -> np.ndarray:
    """Return ``(number, 4)`` xyxy, a third of them small, a third medium, a third as large as fits."""
    longest = random.choice([16, 60, side * 0.9], number).clip(max=side * 0.9)
    size = longest[:, None] * random.uniform(0.5, 1, (number, 2))
    corner = random.uniform(0, 1, (number, 2)) * (side - size)
    boxes = np.concatenate([corner, corner + size], axis=1)
    return boxes.round() + np.array([0, 0, 1, 1]) if whole else boxes


def blobs(random: np.random.Generator, boxes: np.ndarray, side: int) -> torch.Tensor:
    """Return bool masks ``(n, side, side)``: ellipses inside the boxes, a few of them empty."""
    y, x = np.mgrid[:side, :side] + 0.5
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, np.maximum(boxes[:, 2:] - boxes[:, :2], 1) / 2
    distance = ((x - middle[:, 0, None, None]) / half[:, 0, None, None]) ** 2
    distance = distance + ((y - middle[:, 1, None, None]) / half[:, 1, None, None]) ** 2
    masks = (distance <= 1) & (random.random(len(boxes)) > 0.05)[:, None, None]
    return torch.from_numpy(masks.reshape(-1, side, side))
