"""Crops that one class does not fill: MMSegmentation's ``cat_max_ratio``.

Streets are mostly road and rooms mostly wall, so that many a crop holds a single class and teaches little. Here the
share is counted over the labelled pixels of the crop as it will be seen, ignored pixels and the margin left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from detseg.data.geometry import Window, window_mask
from detseg.structures import SemanticMap, Target


def varied(
    target: Target, ratio: float, *, see: Callable[[Window], Window] = lambda window: window
) -> Callable[[Window], bool] | None:
    """Return what says whether a crop is varied enough; ``None`` where any is: no map, or a ratio of 1.

    Args:
        target: whose map the windows show.
        ratio: largest share of the labelled pixels that a class may fill, in (0, 1].
        see: turns a window into one in the pixels of the map.
    """
    semantic = target.semantic
    if semantic is None or ratio >= 1:
        return None
    return lambda window: largest_share(semantic, see(window)) <= ratio


def largest_share(semantic: SemanticMap, window: Window) -> float:
    """Return the share of labelled pixels that the most frequent class has in a window; 1 where none is labelled."""
    shown = window_mask(semantic.labels[None], window, fill=semantic.ignore_index)  # (1, H, W)
    counts = torch.bincount(shown.reshape(-1))  # (K,); choosing the labelled pixels first would take four times as long
    counts[semantic.ignore_index : semantic.ignore_index + 1] = 0
    labelled = int(counts.sum())
    return int(counts.max()) / labelled if labelled else 1.0
