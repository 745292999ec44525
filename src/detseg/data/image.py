"""The one image reader: whatever the file holds, out come upright 8-bit RGB pixels.

| file | becomes |
|---|---|
| 8-bit grey (L), 1-bit | the grey in all three channels; 1-bit is 0 and 255 |
| 16-bit grey | divided by 257, so that 65535 becomes 255 (Pillow alone would cut everything above 255) |
| palette (P) | the palette's colours |
| alpha (LA, RGBA, P with transparency) | laid over white, as a viewer shows it |
| CMYK, YCbCr, LAB, HSV | Pillow's conversion to RGB |
| EXIF orientation | applied |
| several frames | the first |

Maps of labels are read by :func:`read_map`, which keeps index values and ignores palettes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import from_numpy
from torchvision import tv_tensors

from detseg.data.check import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})
"""Lower-case endings of files that readers take for images when they list a folder."""

ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap height and width
_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def read_image(path: str | Path) -> tv_tensors.Image:
    """Return the image as ``(3, H, W)`` uint8 RGB; in memory the three values of a pixel lie together.

    Raises:
        DataError: the file is missing, truncated, no image, or of floating-point pixels; the message names it.
    """
    with _opened(path) as image:
        pixels = _rgb(ImageOps.exif_transpose(image), path)
    return tv_tensors.Image(from_numpy(pixels).permute(2, 0, 1))


def image_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """Return (height, width) from the file's head, without decoding; ``upright`` after its EXIF orientation.

    Raises:
        DataError: the file is missing or no image.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = upright and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_map(path: str | Path) -> NDArray[np.int32]:
    """Return the index values ``(H, W)`` of a map: grey (1, 8, 16 or 32 bits) or palette, whose colours do not matter.

    Raises:
        DataError: the file is missing, broken, or a colour picture; the message names it.
    """
    with _opened(path) as image:
        if image.mode not in ("1", "L", "P", *_SIXTEEN_BIT):
            raise DataError(
                f"{path}: a map of labels must be grey or palette, this one is {image.mode} (colour); "
                "save the label numbers themselves"
            )
        return np.array(image).astype(np.int32)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image, or of a format that Pillow does not know") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be decoded, it is broken or truncated ({error})") from error


def _rgb(image: Image.Image, path: str | Path) -> NDArray[np.uint8]:
    """Return ``(H, W, 3)`` pixels; see the table at the head of this file."""
    if image.mode in _SIXTEEN_BIT:
        return _grey16(image, path)
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode in _ALPHA or "transparency" in image.info:
        coloured = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(coloured)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey16(image: Image.Image, path: str | Path) -> NDArray[np.uint8]:
    values = np.array(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(
            f"{path}: pixel values from {values.min()} to {values.max()}; 16-bit images hold 0 to 65535, save it so"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # rounds to nearest
    return np.ascontiguousarray(np.broadcast_to(grey[:, :, None], (*grey.shape, 3)))
