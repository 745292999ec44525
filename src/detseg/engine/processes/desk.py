"""A directory of one machine through which a launcher, its agent and its workers tell each other things.

It is temporary and no part of the run directory. Files are JSON: ``agent.json`` (which workers failed), ``pid_<rank>``
(who is there to be sent a signal), ``told.json`` (the signal that came), ``rank_<rank>.json`` (how a worker ended) and
``outcome.json`` (what came out).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detseg.atomic import write_atomic

DESK = "DETSEG_DESK"
"""Environment variable: the directory. Not set where somebody started ``torch.distributed.run`` by hand."""

LAUNCHER = "DETSEG_LAUNCHER"
"""Environment variable: the process that started the run, without which its workers end."""

LOG_FILE = "DETSEG_LOG_FILE"
"""Environment variable: where the first worker writes what it prints, too."""

TOLD = "told.json"
"""Where the launcher puts the first signal that it passed on."""


def put(name: str, content: Any, directory: Path | None = None) -> None:
    """Write ``content`` as JSON under ``name``, at once and whole; nothing happens without a directory."""
    if directory is None and DESK not in os.environ:
        return
    write_atomic((directory or Path(os.environ[DESK])) / name, json.dumps(content))


def take(name: str, directory: Path) -> Any:
    """Return what was put under ``name``, or ``None``."""
    path = directory / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def take_all(pattern: str, directory: Path) -> list[Any]:
    """Return everything that was put under names like ``pattern``, in the order of the names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob(pattern))]
