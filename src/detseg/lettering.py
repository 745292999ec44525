"""Text on pictures: captions of boxes, titles and legends, in the font that Pillow carries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""``(H, W, 3)`` RGB."""
Font = ImageFont.FreeTypeFont


def write_captions(
    picture: Picture,
    corners: Sequence[Sequence[int]],
    captions: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    thick: int,
) -> Picture:
    """Write each caption above its box, or inside where there is no room; the first on top, an empty one nowhere."""
    canvas = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(canvas), font_for(picture)
    high = _line_height(font)
    for row in reversed([row for row, caption in enumerate(captions) if caption]):
        left, top = corners[row][:2]
        wide = math.ceil(font.getlength(captions[row])) + 4
        x = max(0, min(left - thick // 2, canvas.width - wide))
        y = top - high if top >= high else max(0, top)
        pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=colours[row])
        pen.text((x + 2, y + high / 2), captions[row], fill=_ink(colours[row]), font=font, anchor="lm")
    return np.array(canvas)


def title_bar(text: str, width: int, font: Font) -> Picture:
    """Return a white bar of ``width`` pixels with centred text."""
    canvas = Image.new("RGB", (width, _line_height(font) + 4), "white")
    ImageDraw.Draw(canvas).text((width / 2, canvas.height / 2), text, fill=(30, 30, 30), font=font, anchor="mm")
    return np.array(canvas)


def legend_strip(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: Font) -> Picture:
    """Return a strip of coloured squares with names, in as many lines as the width asks for."""
    high, x, y = _line_height(font), 4, 4
    places = []
    for name, _ in entries:
        wide = high + math.ceil(font.getlength(name)) + 8
        if x > 4 and x + wide > width:
            x, y = 4, y + high
        places.append((x, y))
        x += wide
    canvas = Image.new("RGB", (width, y + high + 4), "white")
    pen = ImageDraw.Draw(canvas)
    for (x, y), (name, paint) in zip(places, entries, strict=True):
        pen.rectangle((x, y + 2, x + high - 5, y + high - 3), fill=paint, outline=(60, 60, 60))
        pen.text((x + high, y + high / 2), name, fill=(30, 30, 30), font=font, anchor="lm")
    return np.array(canvas)


def font_for(picture: Picture) -> Font:
    """Return PIL's embedded font in a size that suits the picture."""
    font = ImageFont.load_default(size=max(11, round(min(picture.shape[:2]) / 30)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line_height(font: Font) -> int:
    return math.ceil(font.size * 1.35)


def _ink(paint: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever reads better on ``paint``."""
    return (0, 0, 0) if 0.299 * paint[0] + 0.587 * paint[1] + 0.114 * paint[2] > 125 else (255, 255, 255)
