"""Small data sets in every form that the readers know, drawn from a seed; the same scenes in each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

NAMES = ("cup", "plate", "fork")
COCO_IDS = (3, 7, 44)  # with gaps


@dataclass
class Scene:
    """An image, its objects as polygons, and what is drawn where (later objects lie on top)."""

    pixels: np.ndarray
    labels: list[int]
    rings: list[np.ndarray]  # (points, 2) x, y in pixels
    objects: np.ndarray  # (H, W) number of the object from 1, 0 is background
    classes: np.ndarray = field(init=False)  # (H, W) label + 1, 0 is background

    def __post_init__(self) -> None:
        self.classes = np.array([0, *(label + 1 for label in self.labels)])[self.objects].astype(np.uint8)

    def box(self, number: int) -> list[float]:
        """Return xyxy around the polygon."""
        return [*self.rings[number].min(axis=0).tolist(), *self.rings[number].max(axis=0).tolist()]


def scenes(count: int = 4, seed: int = 0, size: tuple[int, int] = (48, 64)) -> list[Scene]:
    """Draw ``count`` scenes; the last has no objects. Polygons are triangles and quadrangles at whole pixels."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number in range(count):
        pixels = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
        objects, labels, rings = np.zeros(size, dtype=np.int32), [], []
        for place in range(0 if number == count - 1 else 2 + number % 2):
            x, y = 4 + 20 * place, int(rng.integers(4, 16))
            w, h = (int(value) for value in rng.integers(8, 17, 2))
            ring = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]][: 3 + place % 2], dtype=np.float64)
            code = coco_mask.merge(coco_mask.frPyObjects([ring.reshape(-1).tolist()], *size))
            mask = coco_mask.decode(code).astype(bool)
            objects[mask] = place + 1
            pixels[mask] = rng.integers(120, 255, 3)
            labels.append(int(rng.integers(0, len(NAMES))))
            rings.append(ring)
        drawn.append(Scene(pixels, labels, rings, objects))
    return drawn


def coco_entries(drawn: list[Scene]) -> dict[str, Any]:
    """Return a COCO file: polygons, and for every third object an uncompressed or a compressed code."""
    images, annotations = [], []
    for number, scene in enumerate(drawn):
        height, width = scene.objects.shape
        images.append({"id": 10 * number, "file_name": f"{number:03d}.png", "height": height, "width": width})
        for place, label in enumerate(scene.labels):
            x1, y1, x2, y2 = scene.box(place)
            annotations.append(
                {
                    "id": len(annotations),  # 0 is an id like any other
                    "image_id": 10 * number,
                    "category_id": COCO_IDS[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [scene.rings[place].reshape(-1).tolist()],
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(COCO_IDS, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories[::-1]}


def write_coco(root: Path, drawn: list[Scene], split: str = "train", content: dict[str, Any] | None = None) -> Path:
    """Write images and ``annotations/instances_<split>.json``; return the JSON file."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number, scene in enumerate(drawn):
        Image.fromarray(scene.pixels).save(root / split / f"{number:03d}.png")
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(coco_entries(drawn) if content is None else content))
    return file


def voc_xml(scene: Scene, name: str, difficult: int = 0) -> str:
    """Return VOC's XML: 1-based, last pixels inside."""
    height, width = scene.objects.shape
    text = f"<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>"
    for place, label in enumerate(scene.labels):
        x1, y1, x2, y2 = (int(value) for value in scene.box(place))
        text += (
            f"<object><name>{NAMES[label]}</name><difficult>{difficult if place == 0 else 0}</difficult><bndbox>"
            f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    return text + "</annotation>"


def write_voc(root: Path, drawn: list[Scene], split: str = "train", difficult: int = 0) -> Path:
    """Write VOC's folders, with palette PNGs whose objects have a border of 255; return the root."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    stems = []
    for number, scene in enumerate(drawn):
        stem = f"{split}_{number}"
        stems.append(stem)
        Image.fromarray(scene.pixels).save(root / "JPEGImages" / f"{stem}.png")
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(scene, f"{stem}.png", difficult))
        inner = cv2.erode((scene.objects > 0).astype(np.uint8), np.ones((3, 3), dtype=np.uint8)) > 0
        border = (scene.objects > 0) & ~inner
        for folder, values in (("SegmentationClass", scene.classes), ("SegmentationObject", scene.objects)):
            _save_palette(root / folder / f"{stem}.png", np.where(border, 255, values).astype(np.uint8))
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


def write_yolo(root: Path, drawn: list[Scene], split: str = "train", polygons: bool = False) -> Path:
    """Write ``images/<split>`` and ``labels/<split>``; the image without objects has no label file. Return the root."""
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(drawn):
        Image.fromarray(scene.pixels).save(images / f"{number:03d}.png")
        height, width = scene.objects.shape
        lines = []
        for place, label in enumerate(scene.labels):
            x1, y1, x2, y2 = scene.box(place)
            values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            if polygons:
                values = (scene.rings[place] / [width, height]).reshape(-1).tolist()
            lines.append(" ".join([str(label), *(f"{value:.8f}" for value in values)]))
        if lines:
            (labels / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    (root / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/{split}\nnc: {len(NAMES)}\nnames:\n{names}\n"
    )
    return root


def write_maps(root: Path, drawn: list[Scene], split: str = "train", kind: str = "classes", suffix: str = "") -> Path:
    """Write ``<split>/images`` and ``<split>/masks``, maps of classes (8 bits) or of object ids (16 bits)."""
    images, masks = root / split / "images", root / split / "masks"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(drawn):
        Image.fromarray(scene.pixels).save(images / f"{number:03d}.png")
        values = scene.classes if kind == "classes" else (scene.objects * 300).astype(np.uint16)  # ids above 255
        Image.fromarray(values).save(masks / f"{number:03d}{suffix}.png")
    return root


def _save_palette(path: Path, values: np.ndarray) -> None:
    image = Image.fromarray(values, mode="P")
    image.putpalette([(17 * place + channel) % 256 for place in range(256) for channel in range(3)])
    image.save(path)
