"""Packages whose names load when they are first used, so that ``import detseg`` and a command's help need no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], public: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package: its ``__name__``.
        homes: name -> the package's module that has it.
        public: the package's ``__all__``.
    """

    def load(name: str) -> Any:
        """Import a name's module and keep what it stands for in the package."""
        if name not in homes:
            raise AttributeError(f"{package} has no {name!r}; it has {', '.join(public)}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        """Return what is there already and what can be loaded."""
        return sorted({*vars(sys.modules[package]), *public})

    return load, names
