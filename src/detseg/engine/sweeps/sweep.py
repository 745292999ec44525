"""What is left of a sweep: a table with mean and spread over seeds, the best line to type, a CSV file and pictures."""

from __future__ import annotations

import csv
import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser

from detseg.engine.sweeps.fingerprint import fingerprint, register
from detseg.engine.sweeps.record import RECORD, State, TrialRecord, write_record

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from detseg.engine.sweeps.space import Space
    from detseg.experiment import Outcome

HEAD = ("trial", "state", "mean", "spread")
TAIL = ("seeds", "values", "seconds", "twin", "error", "directories")
"""Columns of the CSV file before and after one per key."""


@dataclass(frozen=True)
class Row:
    """One set of overrides, over its seeds.

    Attributes:
        number: in the order of trying, from 0.
        parameters: what varies in the sweep, by key, as typed.
        state: complete, pruned, failed or running.
        values: of the figure, one per seed that came to its end.
        seeds: of these.
        seconds: of all its runs.
        error: of a run that failed.
        twin: number of the row whose resolved config is the same.
        directories: of the runs, below the sweep's.
    """

    number: int
    parameters: Mapping[str, str]
    state: State
    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    twin: int | None = None
    directories: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without a value."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, of a sample; NaN below two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass
class Summary:
    """What a sweep came to.

    Attributes:
        directory: of the sweep.
        monitor: the figure that is optimised, with its stage.
        rows: the best first, then what was pruned, failed or has not ended.
        best: the best row; ``None`` where nothing came to its end.
        command: to train the best again, or why there is no best.
        files: written ones worth looking at.
    """

    directory: Path
    monitor: str
    rows: list[Row]
    best: Row | None
    command: str | None
    files: list[Path] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """How many rows failed."""
        return sum(row.state == "failed" for row in self.rows)


def conclude(
    directory: Path,
    rows: Sequence[Row],
    *,
    name: str,
    monitor: str,
    mode: str,
    fixed: Sequence[str] = (),
    space: Space | None = None,
) -> Summary:
    """Order the rows, write ``<name>.csv`` and the pictures, and find the best.

    Args:
        directory: of the sweep.
        rows: in any order.
        name: of the CSV file.
        monitor: the figure, with its stage.
        mode: ``"max"`` or ``"min"``.
        fixed: overrides that all rows share.
        space: what was searched, for the scales of the pictures; ``None``: as the values look.
    """
    from detseg.engine.sweeps.charts import draw_sweep

    sign = -1 if mode == "max" else 1
    ranks: list[State] = ["complete", "pruned", "failed", "running"]
    ordered = sorted(rows, key=lambda row: (ranks.index(row.state), sign * row.mean if row.values else 0, row.number))
    best = ordered[0] if ordered and ordered[0].state == "complete" else None
    files = [write_csv(directory / f"{name}.csv", sorted(rows, key=lambda row: row.number))]
    files += draw_sweep(directory, ordered, monitor=monitor, mode=mode, space=space)
    command = None if best is None else command_line(fixed, best.parameters)
    return Summary(directory=directory, monitor=monitor, rows=ordered, best=best, command=command, files=files)


def command_line(fixed: Sequence[str], parameters: Mapping[str, str]) -> str:
    """Return ``detseg train ...``, quoted for a shell."""
    return shlex.join(["detseg", "train", *fixed, *(f"{key}={value}" for key, value in parameters.items())])


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write one line per row; an empty cell is a figure that there is not. Returns the path."""
    keys = list(dict.fromkeys(key for row in rows for key in row.parameters))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*HEAD, *keys, *TAIL])
        for row in rows:
            figures = ["" if math.isnan(value) else repr(value) for value in (row.mean, row.spread)]
            lists = [" ".join(map(str, row.seeds)), " ".join(map(repr, row.values))]
            twin = "" if row.twin is None else row.twin
            ends = [f"{row.seconds:.1f}", twin, row.error or "", " ".join(row.directories)]
            writer.writerow(
                [row.number, row.state, *figures, *(row.parameters.get(k, "") for k in keys), *lists, *ends]
            )
    return path


# detseg train -m --------------------------------------------------------------------------------------------------


def run_trial(
    cfg: DictConfig, *, train: Callable[[DictConfig], Outcome], overrides: Sequence[str], sweep: Path, number: int
) -> Outcome:
    """Train one trial of ``detseg train -m`` and record how it ended.

    Args:
        cfg: of the trial.
        train: what trains it.
        overrides: of the trial, as composed by the sweeper.
        sweep: the sweep's directory, which holds the trial's.
        number: of the trial in the sweep, the same when the sweep is gone on with.

    Raises:
        ConfigError: another trial of the sweep has the same resolved config; names both. Whatever ``train`` raises.
    """
    directory, started = Path(cfg.paths.output_dir), time.monotonic()
    record = TrialRecord(
        parameters=_by_key(overrides), seed=int(cfg.seed), monitor=str(cfg.task.monitor), mode=str(cfg.task.mode)
    )
    register(sweep, f"{number} ({directory.name})", fingerprint(cfg))
    former = TrialRecord.read(directory)
    try:
        outcome = train(cfg)
        record = record.finished(outcome.figures, seconds=time.monotonic() - started)
    except Exception as error:
        from detseg.engine.errors import said

        record = record.failed(said(error) or type(error).__name__, seconds=time.monotonic() - started)
        raise
    finally:
        if record.state != "running":  # a signal ends a run that can be gone on with
            before = 0.0 if former is None else former.seconds
            record = replace(record, seconds=round(record.seconds + before, 3))
            write_record(directory / RECORD, record)
    return outcome


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides by key, their values as typed; Hydra's own settings are left out."""
    keys = [item.get_key_element() for item in OverridesParser.create().parse_overrides(list(overrides))]
    pairs = zip(keys, overrides, strict=True)
    return {key: text.partition("=")[2] for key, text in pairs if not key.startswith("hydra")}


def summarise(directory: Path) -> Summary | None:
    """Sum up a sweep of ``detseg train -m`` from the records in its trials' directories; ``None`` if there are none."""
    records = [TrialRecord.read(path.parent) for path in sorted(directory.glob(f"*/{RECORD}"), key=_age)]
    found = [record for record in records if record is not None]
    if not found:
        return None
    rows, fixed = group(found)
    figures = list(dict.fromkeys(record.monitor for record in found))
    if len(figures) == 1:
        return conclude(directory, rows, name="sweep", monitor=figures[0], mode=found[0].mode, fixed=fixed)
    files = [write_csv(directory / "sweep.csv", rows)]
    told = f"none: {' and '.join(figures)} cannot be compared; sweep models of one task, or compare by hand"
    return Summary(directory=directory, monitor=" or ".join(figures), rows=rows, best=None, command=told, files=files)


def _age(path: Path) -> float:
    return path.stat().st_mtime


def group(records: Sequence[TrialRecord]) -> tuple[list[Row], list[str]]:
    """Return one row per set of overrides over its seeds, and the overrides that all records share."""
    keys = list(dict.fromkeys(key for record in records for key in record.parameters if key != "seed"))
    first = records[0].parameters
    varied = [key for key in keys if any(record.parameters.get(key) != first.get(key) for record in records)]
    fixed = [f"{key}={first[key]}" for key in keys if key not in varied]
    rows: dict[tuple[str | None, ...], Row] = {}
    for record in records:
        label = tuple(record.parameters.get(key) for key in varied)
        parameters = {key: value for key, value in zip(varied, label, strict=True) if value is not None}
        row = rows.get(label) or Row(number=len(rows), parameters=parameters, state=record.state)
        rows[label] = _with(row, record)
    if len({record.seed for record in records}) == 1 and "seed" in first:
        fixed.append(f"seed={first['seed']}")
    return list(rows.values()), fixed


def _with(row: Row, record: TrialRecord) -> Row:
    """Return ``row`` with one more run."""
    values = () if record.value is None or record.state != "complete" else (record.value,)
    return replace(
        row,
        state="complete" if values or row.values else record.state,
        values=row.values + values,
        seeds=(*row.seeds, record.seed) if values else row.seeds,
        seconds=row.seconds + record.seconds,
        error=record.error or row.error,
        directories=(*row.directories, Path(record.directory).name),
    )
