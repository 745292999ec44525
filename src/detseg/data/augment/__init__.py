"""Augmentations of detectors and instance segmenters beyond what one image and one window give.

``framing`` cuts and widens (SSD), ``colour`` distorts colours (SSD), ``mosaic``, ``mixing`` and ``pasting`` join
several images; ``recipe`` decides which of them a sample gets.
"""

from detseg.data.augment.context import Context, Scene
from detseg.data.augment.recipe import Augment

__all__ = ["Augment", "Context", "Scene"]
