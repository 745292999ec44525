"""Figures for people: rows of a table, in which n/a says how little there was to count.

Figures may carry a prefix that ends in ``/`` or ``_``, such as ``val/`` or ``mask_``; their counts carry the same one.
Loads no torch: a process that starts others prints what they measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Value: TypeAlias = "Tensor | float | int"
_COUNT = re.compile(r"(^|[/_])count(_|$)")
_SIZE = re.compile(r"(small|medium|large)$")
_FIGURE = re.compile(
    r"(map|mar|miou|iou|dice|pixel_accuracy|mean_class_accuracy|accuracy|fw_iou|ar|recall|mask_quality)(_|$)"
)
_OWN_COUNT = {"ar": "ar_", "recall": "ar_", "mask_quality": "mask_quality_"}  # as they stand beside those of boxes
_OF_PIXELS = ("miou", "iou", "dice", "pixel_accuracy", "mean_class_accuracy", "accuracy", "fw_iou")


def table_rows(figures: Mapping[str, Value], class_names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Return (name, value) for each figure, ready to print.

    A per-class figure gives one row per class, named as ``map_per_class apple``. NaN reads ``n/a (0 objects)``. Counts
    are not rows of their own.

    Args:
        figures: what ``compute`` returned; entries of several metrics may be merged.
        class_names: names by label; without them labels are printed.
    """
    rows = []
    for key, value in figures.items():
        if _COUNT.search(key) or (not isinstance(value, float | int) and value.ndim > 1):  # nor are curves and matrices
            continue
        for index, number in _entries(value):
            name = key if index is None else f"{key} {_name(index, class_names)}"
            rows.append((name, _text(key, index, number, figures)))
    return rows


def _entries(value: Value) -> Iterator[tuple[int | None, float | int]]:
    """Yield (None, number) of a scalar, (label, number) of a per-class tensor."""
    if isinstance(value, float | int):
        yield None, value
    elif value.ndim:
        yield from enumerate(value.detach().cpu().tolist())
    else:
        yield None, value.item()


def _name(index: int, class_names: Sequence[str] | None) -> str:
    return str(index) if class_names is None else class_names[index]


def _text(key: str, index: int | None, number: float | int, figures: Mapping[str, Value]) -> str:
    if not math.isnan(number):
        return f"{number:.4f}"
    name = _FIGURE.search(key)
    prefix, figure = (key[: name.start()], name.group(1)) if name else ("", "")
    size = _SIZE.search(key)
    tail = "_per_class" if index is not None else f"_{size.group(1)}" if size else ""
    count = figures.get(f"{prefix}{_OWN_COUNT.get(figure, '')}count{tail}", 0)
    unit = "pixels" if figure in _OF_PIXELS else "objects"
    number_of = count if isinstance(count, float | int) else count.reshape(-1)[index or 0].item()
    return f"n/a ({number_of:g} {unit})"
