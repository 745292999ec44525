"""Mixup of two images (Zhang et al. 2018, arXiv:1710.09412), for detectors as in Zhang et al. 2019, arXiv:1902.04103.

The objects of both count fully, as in YOLOX (arXiv:2107.08430), where the latter weights each object's loss by its
image's share. So the shares are best about equal.
"""

from __future__ import annotations

import cv2
import numpy as np

from detseg.data.augment.context import Scene
from detseg.data.augment.joining import joined
from detseg.data.geometry import as_image, as_pixels


def mix(first: Scene, second: Scene, share: float) -> Scene:
    """Return two images of one size as one, with the objects of both.

    Args:
        first: its id and file become the result's.
        second: what is laid over it.
        share: of the first image, in [0, 1].

    Raises:
        ValueError: the first has a semantic or panoptic map: a pixel of both images has no one class.
    """
    target = first[1]
    if target.semantic is not None or target.panoptic is not None:
        raise ValueError(f"mixup: image {target.image_id} has a map of classes, and a pixel of two images no one class")
    pixels = cv2.addWeighted(as_pixels(first[0]), share, as_pixels(second[0]), 1 - share, 0.0)
    return as_image(np.asarray(pixels, np.uint8)), joined([target, second[1]])
