"""The storage that a study shares with its trials: Optuna's, which is imported when it is opened."""

from __future__ import annotations

from typing import Any

PRUNED = "pruned_at"
"""Attribute of a trial in its study: the epoch, from 1, after which it was stopped."""


def open_storage(url: str) -> Any:
    """Open Optuna's storage, creating its tables where there are none; writers wait for each other.

    Raises:
        ImportError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("a search needs Optuna: pip install 'detseg[tune]'") from error
    wait = 60  # seconds; SQLite's own 5 are short for many trials on a network disk
    engine = {"connect_args": {"timeout": wait}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=engine)
