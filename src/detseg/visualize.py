"""Pictures of truth and predictions. Every function returns a new uint8 array ``(H, W, 3)`` RGB; none shows a window.

Example::

    detseg.draw("photo.jpg", found, class_names=["apple", "pear", "orange"], path="found.png")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detseg.lettering import Picture, font_for, legend_strip, title_bar, write_captions
from detseg.structures import Detections, SemanticMap, Target

Shown = Detections | Target | SemanticMap
"""What can be drawn over an image."""

# Okabe and Ito 2008, "Color Universal Design", without black; then hues of Paul Tol's "muted" scheme. Each set
# keeps apart under the common kinds of colour blindness.
PALETTE = (
    (213, 94, 0), (0, 158, 115), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 114, 178), (230, 159, 0),
    (136, 34, 85), (68, 170, 153), (170, 68, 153), (51, 34, 136), (153, 153, 51), (136, 204, 238), (17, 119, 51),
)  # fmt: skip
BACKGROUND = "background"
"""Name of the class that readers give to pixels without an object; it is not tinted."""
CROWDED = 12
"""Objects of the only class there is, above which captions would hide more than they say and are left out."""
LEGIBLE = 320
"""Pixels of the shorter side below which ``draw`` enlarges an image, so that labels can be read."""


def colour(label: int) -> tuple[int, int, int]:
    """Return the fixed RGB colour of a class, 0..255; it repeats after ``len(PALETTE)`` classes."""
    return PALETTE[label % len(PALETTE)]


def draw(
    image_or_path: str | Path | Tensor | Picture,
    found: Shown,
    class_names: Sequence[str] | None = None,
    path: str | Path | None = None,
    *,
    min_score: float = 0.3,
    scale: int | None = None,
) -> Picture:
    """Draw what was found, or what is true, over an image.

    Args:
        image_or_path: a file, a tensor ``(3, H, W)`` (uint8, or float in [0, 1]) or an array ``(H, W, 3)`` uint8, RGB.
        found: detections, a target or a semantic map in the pixels of the image.
        class_names: one name per label; ``None`` shows numbers.
        path: where to write the picture; the ending decides the format.
        min_score: detections below this score are left out.
        scale: whole factor of enlargement; ``None`` enlarges small images until labels can be read.

    Raises:
        ValueError: a label has no name, or a mask or map differs from the image in size.
    """
    image = to_picture(image_or_path)
    factor = legible_scale(image.shape[0], image.shape[1]) if scale is None else scale
    if isinstance(found, SemanticMap):
        picture = draw_semantic(image, found, class_names, scale=factor)
    elif isinstance(found, Target):
        picture = draw_target(image, found, class_names, scale=factor)
    else:
        picture = draw_detections(image, found, class_names, min_score=min_score, scale=factor)
    if path is not None:
        save(picture, path)
    return picture


def draw_detections(
    image: Tensor | Picture,
    found: Detections,
    class_names: Sequence[str] | None = None,
    *,
    min_score: float = 0.0,
    scale: int = 1,
    opacity: float = 0.3,
) -> Picture:
    """Draw boxes, masks where there are any, and labels with scores; the best detection lies on top.

    Args:
        image: as for :func:`draw`.
        found: detections in the pixels of ``image``.
        class_names: one name per label.
        min_score: detections below this score are left out.
        scale: whole factor of enlargement.
        opacity: of the mask's fill, 0 to 1.
    """
    found = found.cpu()
    found = found[found.scores >= min_score]
    found = found[found.scores.argsort(descending=True, stable=True)]
    names = _names(found.labels, class_names)
    captions = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist(), strict=True)]
    captions, paints = _one_class(found.labels, found.masks, captions, class_names)
    return _draw_objects(image, found.boxes, paints, found.masks, captions, None, scale=scale, opacity=opacity)


def draw_target(
    image: Tensor | Picture,
    target: Target,
    class_names: Sequence[str] | None = None,
    *,
    scale: int = 1,
    opacity: float = 0.3,
) -> Picture:
    """Draw the truth: its semantic map if it has one, otherwise boxes and masks; crowd regions are hatched.

    Args:
        image: as for :func:`draw`.
        target: the truth in the pixels of ``image``.
        class_names: one name per label.
        scale: whole factor of enlargement.
        opacity: of fills, 0 to 1.
    """
    target = target.cpu()
    if target.semantic is not None:
        return draw_semantic(image, target.semantic, class_names, scale=scale)
    marks = zip(_names(target.labels, class_names), target.iscrowd.tolist(), target.difficult.tolist(), strict=True)
    captions = [name + (" (crowd)" if crowd else " (difficult)" if hard else "") for name, crowd, hard in marks]
    captions, paints = _one_class(target.labels, target.masks, captions, class_names)
    return _draw_objects(
        image, target.boxes, paints, target.masks, captions, target.iscrowd, scale=scale, opacity=opacity
    )


def draw_semantic(
    image: Tensor | Picture,
    semantic: SemanticMap,
    class_names: Sequence[str] | None = None,
    *,
    scale: int = 1,
    opacity: float = 0.55,
    legend: bool = True,
) -> Picture:
    """Tint each pixel with the colour of its class; pixels without a class are hatched, ``background`` stays clear.

    Args:
        image: as for :func:`draw`.
        semantic: the class of each pixel of ``image``.
        class_names: one name per label.
        scale: whole factor of enlargement.
        opacity: of the tint, 0 to 1.
        legend: name the classes that occur in a strip below the picture.
    """
    picture = enlarge(to_picture(image), scale)
    labels = semantic.labels.cpu().numpy().astype(np.int64)
    _check_size("the semantic map", labels.shape, picture, scale)
    labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    void = labels == semantic.ignore_index
    table = np.array(PALETTE, np.float32)
    tint = table[np.where(void, 0, labels) % len(PALETTE)]  # (H, W, 3)
    tint[void] = np.where(_stripes(picture)[void][:, None], 230, 40)
    clear = [label for label, name in enumerate(class_names or ()) if name == BACKGROUND]
    opacities = np.where(np.isin(labels, clear), 0, opacity).astype(np.float32)[..., None]  # (H, W, 1)
    picture = (picture + (tint - picture) * opacities + 0.5).astype(np.uint8)
    if not legend:
        return np.asarray(picture, np.uint8)
    present = torch.from_numpy(np.setdiff1d(labels[~void], clear))
    entries = list(zip(_names(present, class_names), map(colour, present.tolist()), strict=True))
    if void.any():
        entries.append(("no class", (150, 150, 150)))
    return np.concatenate([picture, legend_strip(entries, picture.shape[1], font_for(picture))])


def side_by_side(
    truth: Picture, prediction: Picture, titles: tuple[str, str] = ("ground truth", "prediction")
) -> Picture:
    """Put two pictures beside each other under their titles; the lower one is filled up with white."""
    height = max(truth.shape[0], prediction.shape[0])
    columns = []
    for picture, title in zip((truth, prediction), titles, strict=True):
        filled = np.full((height, picture.shape[1], 3), 255, np.uint8)
        filled[: picture.shape[0]] = picture
        columns.append(np.concatenate([title_bar(title, picture.shape[1], font_for(picture)), filled]))
    return np.concatenate([columns[0], np.full((columns[0].shape[0], 4, 3), 255, np.uint8), columns[1]], axis=1)


def contact_sheet(pictures: Sequence[Tensor | Picture], *, columns: int | None = None, gap: int = 4) -> Picture:
    """Lay pictures out in rows, left to right, each in a cell of the largest one's size.

    Args:
        pictures: at least one, of any sizes.
        columns: pictures in a row; ``None`` makes the sheet about square.
        gap: white pixels between pictures.

    Raises:
        ValueError: there are no pictures.
    """
    if not pictures:
        raise ValueError("contact_sheet: there are no pictures; give at least one")
    tiles = [to_picture(picture) for picture in pictures]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = (max(tile.shape[axis] for tile in tiles) + gap for axis in (0, 1))
    sheet = np.full((rows * height - gap, columns * width - gap, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def save(picture: Picture, path: str | Path) -> Path:
    """Write a picture, making its directory; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        Image.fromarray(picture).save(path, compress_level=1)  # a third of the time, a third larger
    else:
        Image.fromarray(picture).save(path)
    return path


def to_picture(image: str | Path | Tensor | Picture) -> Picture:
    """Return an image as a new array ``(H, W, 3)`` uint8.

    Args:
        image: as for :func:`draw`; floats are taken as [0, 1] and clipped.

    Raises:
        ValueError: another shape or dtype.
        DataError: a file that is missing, truncated or no image.
    """
    pixels: Tensor | Picture
    if isinstance(image, str | Path):
        from detseg.data.image import read_image  # the one reader: upright, 16-bit and CMYK as the models see them

        pixels = read_image(image)
    else:
        pixels = image
    if isinstance(pixels, Tensor):
        tensor = pixels.detach().cpu()
        if tensor.is_floating_point():
            tensor = (tensor.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        array = np.moveaxis(tensor.numpy(), 0, -1) if tensor.ndim == 3 and tensor.shape[0] == 3 else tensor.numpy()
    else:
        array = np.asarray(pixels)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"an image is a (3, H, W) tensor, uint8 or float, or an (H, W, 3) uint8 array; "
            f"got {tuple(pixels.shape)} {pixels.dtype}"
        )
    return np.array(array, order="C")


def legible_scale(height: int, width: int) -> int:
    """Return the least whole factor that brings the shorter side to ``LEGIBLE`` pixels, at least 1."""
    return max(1, math.ceil(LEGIBLE / max(1, min(height, width))))


def enlarge(picture: Picture, scale: int) -> Picture:
    """Enlarge by a whole factor, smoothly."""
    if scale == 1:
        return picture
    size = (picture.shape[1] * scale, picture.shape[0] * scale)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def _one_class(
    labels: Tensor, masks: Tensor | None, captions: list[str], class_names: Sequence[str] | None
) -> tuple[list[str], Tensor]:
    """Return captions and colour numbers; of one class alone, masks take a colour each, so that neighbours part."""
    if class_names is None or len(class_names) != 1:
        return captions, labels
    paints = labels if masks is None else torch.arange(len(labels))
    return ([""] * len(captions) if len(captions) > CROWDED else captions), paints


def _draw_objects(
    image: Tensor | Picture,
    boxes: Tensor,
    paints: Tensor,
    masks: Tensor | None,
    captions: Sequence[str],
    crowd: Tensor | None,
    *,
    scale: int,
    opacity: float,
) -> Picture:
    """Draw objects, the first one on top: fills, then outlines, then captions, so that no caption is painted over."""
    picture = enlarge(to_picture(image), scale)
    colours = [colour(number) for number in paints.tolist()]
    hatched = [False] * len(boxes) if crowd is None else crowd.tolist()
    thick = max(1, round(min(picture.shape[:2]) / 250))
    corners = (boxes * scale).round().long().tolist()
    for row in reversed(range(len(boxes))):
        if masks is not None:
            _check_size("a mask", masks[row].shape, picture, scale)
            _fill(picture, _grow(masks[row], scale), colours[row], opacity, hatched=hatched[row], outline=thick)
        elif hatched[row]:
            region = np.zeros(picture.shape[:2], bool)
            left, top, right, bottom = (max(0, side) for side in corners[row])
            region[top:bottom, left:right] = True
            _fill(picture, region, colours[row], opacity, hatched=True, outline=0)
    for row in reversed(range(len(boxes))):
        left, top, right, bottom = corners[row]
        cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), colours[row], thick)
    return write_captions(picture, corners, captions, colours, thick)


def _grow(mask: Tensor, scale: int) -> NDArray[np.bool_]:
    """Enlarge a mask with a smooth edge."""
    array = mask.numpy()
    if scale == 1:
        return array
    size = (array.shape[1] * scale, array.shape[0] * scale)
    return np.asarray(cv2.resize(array.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR) > 127)


def _fill(
    picture: Picture,
    mask: NDArray[np.bool_],
    paint: tuple[int, int, int],
    opacity: float,
    *,
    hatched: bool,
    outline: int,
) -> None:
    """Tint the masked pixels, in stripes if hatched, and draw the mask's outline; in place."""
    inside = mask & _stripes(picture) if hatched else mask
    tint = np.array(paint, np.float32)
    picture[inside] = (picture[inside] + (tint - picture[inside]) * opacity + 0.5).astype(np.uint8)
    if outline:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, paint, outline, lineType=cv2.LINE_AA)


def _stripes(picture: Picture) -> NDArray[np.bool_]:
    """Return diagonal stripes, half of the pixels, at the size of a picture."""
    height, width = picture.shape[:2]
    period = max(3, min(height, width) // 40)
    stripes: NDArray[np.bool_] = (np.arange(height)[:, None] + np.arange(width)[None]) // period % 2 == 0
    return stripes


def _names(labels: Tensor, class_names: Sequence[str] | None) -> list[str]:
    numbers = labels.tolist()
    if class_names is None:
        return [str(label) for label in numbers]
    if numbers and max(numbers) >= len(class_names):
        raise ValueError(
            f"label {max(numbers)} has no name: there are {len(class_names)}, {list(class_names)}; "
            "give the class names of the data that the labels come from"
        )
    return [class_names[label] for label in numbers]


def _check_size(what: str, shape: Sequence[int], picture: Picture, scale: int) -> None:
    size = (picture.shape[0] // scale, picture.shape[1] // scale)
    if tuple(shape) != size:
        raise ValueError(f"{what} has size {tuple(shape)}, the image {size}; call resize() on what was found first")
