"""Batches as plain dicts and back, so that a file of them loads with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from detseg.structures.base import TensorFields
from detseg.structures.batch import Batch
from detseg.structures.maps import PanopticMap, SemanticMap
from detseg.structures.target import Target

KIND = "kind"
"""The key that names the structure, one of ``KINDS``."""

KINDS: dict[str, type[TensorFields]] = {kind.__name__: kind for kind in (Batch, Target, SemanticMap, PanopticMap)}


def to_plain(value: Any) -> Any:
    """Return a structure as a dict of tensors, numbers, text and lists; anything else as it is."""
    if is_dataclass(value) and type(value).__name__ in KINDS:
        named = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {KIND: type(value).__name__, **named}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value


def from_plain(value: Any) -> Any:
    """Return what ``to_plain`` was given.

    Raises:
        ValueError: a dict names no structure, or its fields do not fit (as from another version of the package).
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kind = KINDS.get(str(value.get(KIND)))
    if kind is None:
        raise ValueError(f"a structure is called {value.get(KIND)!r}; known are {', '.join(KINDS)}")
    try:
        return kind(**{str(key): from_plain(item) for key, item in value.items() if key != KIND})
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}; the file may be of another version of detseg") from error
