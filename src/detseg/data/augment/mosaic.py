"""Mosaic: four images around a point (Bochkovskiy, Wang & Liao 2020, "YOLOv4", arXiv:2004.10934, section 3.3).

Each image is drawn straight into its quarter of the canvas at its own scale, so that no pixel is resampled twice and
none is made that does not show. An image larger than its quarter is cut at a random place, where YOLOX cuts each at
the point in the middle and never shows, of the upper ones, the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from detseg.data.augment.context import Scene
from detseg.data.augment.joining import Size, joined, joined_panoptic, joined_semantic, moved


class Quarter(NamedTuple):
    """A part of the canvas.

    Attributes:
        offset: (down, right) of its corner.
        size: (height, width).
        anchor: where a smaller image lies in it, as (down, right) from 0 to 1: at the point in the middle.
    """

    offset: Size
    size: Size
    anchor: tuple[float, float]


def quarters(canvas: Size, centre: tuple[float, float]) -> list[Quarter]:
    """Return the four parts of a canvas of at least 2 x 2 pixels around a point.

    Args:
        canvas: (height, width).
        centre: (down, right) as shares of the canvas.
    """
    cuts = [min(max(1, round(side * share)), side - 1) for side, share in zip(canvas, centre, strict=True)]
    spans = [[(0, cut, 1.0), (cut, side - cut, 0.0)] for cut, side in zip(cuts, canvas, strict=True)]
    return [
        Quarter(offset=(top, left), size=(height, width), anchor=(down, right))
        for top, height, down in spans[0]
        for left, width, right in spans[1]
    ]


def mosaic(scenes: Sequence[Scene], parts: Sequence[Quarter], canvas: Size) -> Scene:
    """Return the images of four parts as one.

    Args:
        scenes: each as large as its part; id and file of the first become the result's.
        parts: from ``quarters``.
        canvas: (height, width).
    """
    pixels = torch.empty((*canvas, 3), dtype=torch.uint8).permute(2, 0, 1)  # (3, H, W), rows of pixels in memory
    for (image, _), ((top, left), (height, width), _) in zip(scenes, parts, strict=True):
        pixels[:, top : top + height, left : left + width] = image.as_subclass(Tensor)
    offsets = [part.offset for part in parts]
    targets = [target for _, target in scenes]
    semantic = [target.semantic for target in targets if target.semantic is not None]
    panoptic = [target.panoptic for target in targets if target.panoptic is not None]
    together = replace(
        joined([moved(target, offset, canvas) for target, offset in zip(targets, offsets, strict=True)]),
        semantic=joined_semantic(semantic, offsets, canvas) if semantic else None,
        panoptic=joined_panoptic(panoptic, offsets, canvas) if panoptic else None,
    )
    return pixels, together
