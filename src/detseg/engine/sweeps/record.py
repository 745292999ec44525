"""``trial.json``: what one run of a sweep was and how it ended, for ``detseg train -m`` and ``detseg tune``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from detseg.atomic import write_atomic
from detseg.secrecy import redact, veil

RECORD = "trial.json"

State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One run of a sweep.

    Attributes:
        parameters: overrides by key, as typed; without ``seed`` where seeds are runs of one set.
        seed: of the run.
        monitor: the figure that is optimised, with its stage: ``"val/map"``.
        mode: ``"max"`` or ``"min"``.
        state: how it ended.
        value: of the figure; ``None`` where there is none.
        error: what went wrong, in a line.
        seconds: the run took.
        number: of the trial in its study; ``None`` outside studies.
        twin: number of the trial whose value was taken over because the resolved configs are equal.
    """

    parameters: Mapping[str, str]
    seed: int
    monitor: str
    mode: str
    state: State = "running"
    value: float | None = None
    error: str | None = None
    seconds: float = 0.0
    number: int | None = None
    twin: int | None = None
    directory: str = field(default="", compare=False)

    def finished(self, figures: Mapping[str, float], *, seconds: float) -> Self:
        """Return the record of a run that came to its end with ``figures``, by name without stage."""
        name = self.monitor.partition("/")[2] or self.monitor
        value = figures.get(name, math.nan)
        if not math.isfinite(value):
            known = ", ".join(sorted(key for key in figures if "/" not in key)) or "none"
            return self.failed(f"{self.monitor} has no value; figures of the run: {known}", seconds=seconds)
        return replace(self, state="complete", value=float(value), seconds=round(seconds, 3))

    def failed(self, error: str, *, seconds: float) -> Self:
        """Return the record of a run that failed with ``error``."""
        line = redact(" ".join(error.split()))[:2000]
        return replace(self, state="failed", error=line, seconds=round(seconds, 3))

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Return the record in a run's directory, or ``None`` where the run has not ended."""
        path = directory / RECORD
        if not path.is_file():
            return None
        return cls(**json.loads(path.read_text(encoding="utf-8")) | {"directory": str(directory)})


def write_record(path: Path, record: TrialRecord) -> None:
    """Write a record whole or not at all."""
    content = {key: value for key, value in asdict(record).items() if key != "directory"}
    write_atomic(path, json.dumps(veil(content), indent=1, allow_nan=False) + "\n")
