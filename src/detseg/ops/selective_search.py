"""Selective search: `"Selective Search for Object Recognition" <https://doi.org/10.1007/s11263-013-0620-5>`_ (2013).

An image is cut into small segments, of which the two most alike are joined until one is left; every box around a
segment that exists on the way is a region. Several colour spaces, thresholds of the first cut and measures of likeness
(section 3 and table 7) give several such hierarchies. Segmentation and joining are OpenCV's.

Differs from the paper:

- The order. OpenCV draws it with ``rand()``, so that no two calls agree. The paper too ranks by chance, times the depth
  in the hierarchy. Here chance is a hash of the box, and boxes that overlap an earlier one by more than IoU 0.8 follow
  after all others, so that a few boxes cover much: the same image gives the same boxes in the same order, whatever
  the process and the number of threads. Measured on 40 and 24 validation images, mode ``quality``, 1,200 and 10,000
  boxes each; recall at IoU 0.5 of the first 100 / 300 / 1000 / 2000:

  ============================  =========================  =========================
  order                         Orchard, 128 px            bccd, 240 x 320
  ============================  =========================  =========================
  larger first                  0.03 / 0.21 / 0.82 / 1.00  0.00 / 0.00 / 0.06 / 0.59
  smaller first                 0.20 / 0.62 / 0.98 / 1.00  0.00 / 0.00 / 0.02 / 0.05
  rank by size times chance     0.67 / 0.90 / 1.00 / 1.00  0.21 / 0.54 / 0.86 / 0.92
  found by most hierarchies     0.86 / 0.99 / 1.00 / 1.00  0.15 / 0.39 / 0.74 / 0.93
  chance                        0.87 / 1.00 / 1.00 / 1.00  0.40 / 0.70 / 0.91 / 0.96
  chance, near-duplicates last  0.91 / 1.00 / 1.00 / 1.00  0.40 / 0.71 / 0.93 / 0.97
  ============================  =========================  =========================

- r and g of the space rgI are not divided by the intensity (OpenCV's choice; alone it finds 0.82 of the cells
  of bccd, the paper's 0.67).
- Boxes are at whole pixels, as ``side`` may have changed the size of the image.

Letters: N boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detseg.ops.box_order import spread_order

VERSION = 1
"""Raised whenever other boxes, or another order, come out of the same parameters."""

MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]] = {
    "single": (("hsv",), ("CTSF",), (100.0,)),
    "fast": (("hsv", "lab"), ("CTSF", "TSF"), (50.0, 100.0)),
    "quality": (("hsv", "lab", "rgi", "hue", "intensity"), ("CTSF", "TSF", "F", "S"), (50.0, 100.0, 150.0, 300.0)),
}
"""Colour spaces, likenesses (Colour, Texture, Size, Fill), thresholds k: 1, 8 and 80 hierarchies as in table 7."""

SIGMA = 0.8  # pixels of the blur before the first segmentation; the paper's
DUPLICATE = 0.8  # IoU above which a box says little beside another
SMALLEST = 8  # pixels: OpenCV's textures need room; a smaller image is one region


class SelectiveSearch:
    """Selective search; see the head of this file.

    Args:
        mode: ``single``, ``fast`` or ``quality``: 1, 8 or 80 hierarchies.
        limit: boxes at most; ``None`` for all, some 10,000 on a full photo.
        side: pixels that the longer side has while it searches, larger for small objects, smaller for speed; ``None``:
            the image's own.
        min_side: boxes narrower or lower than this, in pixels of the image, are left out.
        min_segment: least pixels of a first segment, at the size that ``side`` says.
        thresholds: k of the first segmentations, larger for larger segments; ``None``: those of the mode.

    Raises:
        ValueError: an unknown mode, or a number outside its range.
    """

    def __init__(
        self,
        *,
        mode: str = "fast",
        limit: int | None = 2000,
        side: int | None = None,
        min_side: float = 8.0,
        min_segment: int = 20,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"SelectiveSearch: mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
        self.thresholds = tuple(float(k) for k in (MODES[mode][2] if thresholds is None else thresholds))
        if (limit is not None and limit < 1) or (side is not None and side < 1) or min_side < 1 or min_segment < 1:
            raise ValueError(
                f"SelectiveSearch: limit={limit}, side={side}, min_side={min_side}, min_segment={min_segment} must be "
                "at least 1"
            )
        if not self.thresholds or min(self.thresholds) <= 0:
            raise ValueError(
                f"SelectiveSearch: thresholds={list(self.thresholds)}; give some above 0, such as [50, 100]"
            )
        self.mode, self.limit, self.side = mode, limit, side
        self.min_side, self.min_segment = float(min_side), min_segment

    @property
    def key(self) -> str:
        """Name, versions and every parameter; another OpenCV may find other boxes."""
        return f"{self!r} version {VERSION} OpenCV {cv2.__version__}"

    def __repr__(self) -> str:
        return (
            f"SelectiveSearch(mode={self.mode!r}, limit={self.limit}, side={self.side}, min_side={self.min_side}, "
            f"min_segment={self.min_segment}, thresholds={list(self.thresholds)})"
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Return boxes ``(N, 4)`` float32 xyxy at whole pixels, in the order above; see ``Proposer``.

        The whole image is always among all boxes; of an image without structure, or below 8 pixels, it is the only one.

        Args:
            image: ``(3, H, W)`` uint8 RGB.

        Raises:
            ValueError: the image has another shape or type, or no pixels.
        """
        pixels = as_pixels(image, type(self).__name__)  # (H, W, 3)
        height, width = pixels.shape[:2]
        found = self._search(_resized(pixels, self.side), (height, width))  # (N, 4)
        sides = found[:, 2:] - found[:, :2]  # (N, 2)
        whole = (sides == (width, height)).all(axis=1)
        boxes = found[(sides >= self.min_side).all(axis=1) | whole]
        order = spread_order(boxes, duplicate=DUPLICATE)[: self.limit]
        return torch.from_numpy(boxes[order].astype(np.float32))

    def _search(self, pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.int64]:
        """Return all boxes ``(N, 4)`` in whole pixels of an image of ``size`` (h, w), each once, sorted."""
        whole = np.array([[0, 0, size[1], size[0]]])
        height, width = pixels.shape[:2]
        if min(height, width) < SMALLEST or bool((pixels == pixels[0, 0]).all()):
            return whole
        rectangles = self._searcher(pixels).process().astype(np.float64)  # (N, 4) x, y, width, height
        corners = np.concatenate([rectangles[:, :2], rectangles[:, :2] + rectangles[:, 2:]], axis=1)  # (N, 4)
        scale = np.array([size[1] / width, size[0] / height] * 2)
        boxes = np.concatenate([np.rint(corners * scale).astype(np.int64), whole])  # (N, 4)
        return np.unique(boxes, axis=0)

    def _searcher(self, pixels: NDArray[np.uint8]) -> Any:
        """Return OpenCV's object for one image ``(H, W, 3)``; it must not see a second one."""
        module = cv2.ximgproc.segmentation
        spaces, likenesses, _ = MODES[self.mode]
        parts = {
            "C": module.createSelectiveSearchSegmentationStrategyColor(),
            "T": module.createSelectiveSearchSegmentationStrategyTexture(),
            "S": module.createSelectiveSearchSegmentationStrategySize(),
            "F": module.createSelectiveSearchSegmentationStrategyFill(),
        }  # shared by the likenesses, so that the histograms of a segmentation are made once
        searcher = module.createSelectiveSearchSegmentation()
        for space in spaces:
            searcher.addImage(in_space(pixels, space))
        for threshold in self.thresholds:
            searcher.addGraphSegmentation(module.createGraphSegmentation(SIGMA, threshold, self.min_segment))
        for likeness in likenesses:
            chosen = [parts[letter] for letter in likeness]
            joined = module.createSelectiveSearchSegmentationStrategyMultiple
            searcher.addStrategy(chosen[0] if len(chosen) == 1 else joined(*chosen))
        return searcher


def as_pixels(image: Tensor, owner: str) -> NDArray[np.uint8]:
    """Return an image ``(3, H, W)`` uint8 as pixels ``(H, W, 3)`` whose values lie together.

    Raises:
        ValueError: it has another shape or type, or no pixels.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(
            f"{owner}: the image is {tuple(image.shape)} {image.dtype}; it must be (3, H, W) uint8 RGB with at least "
            "one pixel"
        )
    return np.ascontiguousarray(image.as_subclass(Tensor).cpu().permute(1, 2, 0).numpy())


def in_space(pixels: NDArray[np.uint8], space: str) -> NDArray[np.uint8]:
    """Return RGB pixels ``(H, W, 3)`` in another space: ``(H, W, 3)``, of ``hue`` and ``intensity`` ``(H, W)``."""
    codes = {"hsv": cv2.COLOR_RGB2HSV, "hue": cv2.COLOR_RGB2HSV, "lab": cv2.COLOR_RGB2Lab}
    converted = np.asarray(cv2.cvtColor(pixels, codes.get(space, cv2.COLOR_RGB2GRAY)), dtype=np.uint8)
    if space == "hue":
        return np.ascontiguousarray(converted[..., 0])
    return np.dstack([pixels[..., :2], converted]) if space == "rgi" else converted


def _resized(pixels: NDArray[np.uint8], side: int | None) -> NDArray[np.uint8]:
    """Return pixels ``(H, W, 3)`` whose longer side has ``side`` pixels."""
    height, width = pixels.shape[:2]
    if side is None or side == max(height, width):
        return pixels
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    kind = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size, interpolation=kind), dtype=np.uint8)
