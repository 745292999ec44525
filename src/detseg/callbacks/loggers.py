"""CSV and TensorBoard: cheap to write at every step, and continued where a run goes on in its own directory.

Lightning's ``CSVLogger`` deletes the table of an earlier start, and opens the file at every row; its TensorBoard logger
writes one event per figure.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from detseg.atomic import write_atomic
from detseg.callbacks.handover import Handover, Row
from detseg.secrecy import veil

log = logging.getLogger(__name__)

FLUSH_AFTER = 10.0
"""Seconds after which what was logged is on disk, where a dashboard can see it."""


@runtime_checkable
class Closes(Protocol):
    """A logger that wants to know how the run ended."""

    def close(self, exit_code: int) -> None:
        """Write what is left, with the exit code of the run: 0 done, 143 ended by SIGTERM, ..."""


@contextmanager
def closing(loggers: Iterable[Logger]) -> Iterator[None]:
    """Tell every logger that can hear it how the run in this block ended.

    One that cannot be closed keeps no other from hearing it; its error is raised where the run has none of its own.
    """
    code, failures = 0, list[Exception]()
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        for logger in loggers:
            try:
                if isinstance(logger, Closes):
                    logger.close(code)
            except Exception as error:
                log.warning("%s could not be closed: %s", type(logger).__name__, error)
                failures.append(error)
        if failures and code == 0:
            raise failures[0]


def exit_code(error: BaseException) -> int:
    """Return the exit code that a process ends with on ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


class CsvLog(Logger):
    """A table of all figures, ``<save_dir>/<name>/metrics.csv``, and the config in ``hparams.yaml`` beside it.

    One row per step and moment (a training step, a validation), empty where a figure was not taken. A new figure
    becomes a new column. Where a run goes on in its directory, rows past its checkpoint are dropped and the table
    grows on.

    Args:
        save_dir: the run's directory.
        name: folder in it.
        flush_logs_every_n_steps: rows between two writes; after 10 seconds and at every validation and checkpoint they
            are written anyway.
    """

    def __init__(self, *, save_dir: str | Path, name: str = "csv", flush_logs_every_n_steps: int = 100) -> None:
        super().__init__()
        self._directory, self._name = Path(save_dir), name
        self._every = flush_logs_every_n_steps
        self._columns: list[str] | None = None  # of the file; None: not looked at yet
        self._rows: list[dict[str, Any]] = []  # not written yet
        self._repeated: set[tuple[int, frozenset[str]]] = set()  # step and figures of rows that may come again
        self._written = time.monotonic()

    @property
    def name(self) -> str:
        """Folder of the table in the run's directory."""
        return self._name

    @property
    def version(self) -> str:
        """Empty: a run has its own directory."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's directory."""
        return str(self._directory)

    @property
    def path(self) -> Path:
        """The table."""
        return self._directory / self._name / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write the config."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(plain(params), sort_keys=False, allow_unicode=True)
        self.path.with_name("hparams.yaml").write_text(text, encoding="utf-8")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        row = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        row["step"] = 0 if step is None else step
        if self._repeated and (row["step"], frozenset(row)) in self._repeated:
            return
        self._rows.append(row)
        if len(self._rows) >= self._every or time.monotonic() - self._written > FLUSH_AFTER:
            self.save()

    @rank_zero_only
    def begin_at(self, step: int) -> None:
        """Drop the rows of ``step`` and later, and a last line that was cut off."""
        self._rows = [row for row in self._rows if row["step"] < step]
        rows = [row for row in self._read() if int(row["step"]) < step]
        self._columns = sorted({name for row in rows for name in row})
        self._repeated = {(step - 1, frozenset(row)) for row in rows if int(row["step"]) == step - 1}
        if self.path.exists():
            self._replace(rows)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not on disk yet."""
        self._written = time.monotonic()
        rows, self._rows = self._rows, []
        if not rows:
            return
        if self._columns is None:
            self._columns = _header(self.path)
        new = {name for row in rows for name in row} - set(self._columns)
        if new:
            before = self._read()
            self._columns = sorted({*self._columns, *new})
            self._replace([*before, *rows])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._text(rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rows that are not on disk yet."""
        self.save()

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Write the rows that are not on disk yet."""
        self.save()

    def _read(self) -> list[dict[str, str]]:
        """Return the rows of the file with the figures that they have; a line without its end does not count."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            whole = [line for line in file if line.endswith("\n")]
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(whole) if row.get("step")]

    def _replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole table beside the old one and put it in its place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, self._text(rows, header=True))

    def _text(self, rows: Iterable[Mapping[str, Any]], *, header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self._columns or [])
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


class EventLog(TensorBoardLogger):
    """TensorBoard's event files in ``<save_dir>/<name>``; a row of figures is one event.

    Args:
        save_dir: the run's directory.
        name: folder in it.
    """

    def __init__(self, *, save_dir: str | Path, name: str = "tensorboard") -> None:
        # No empty figure in the list, and no version_0 folder: a run has its own directory.
        super().__init__(
            save_dir=save_dir, name=name, version="", default_hp_metric=False, flush_secs=round(FLUSH_AFTER)
        )
        self._handover = Handover(self._store)  # TensorBoard's checksums are Python, a tenth of a millisecond per row

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row as one event."""
        _ = self.experiment  # begun here, not in the thread
        self._handover.put(metrics, step)

    def _store(self, rows: list[Row]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self.experiment._get_file_writer()
        for metrics, step, moment in rows:
            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
            writer.add_event(Event(summary=Summary(value=values)), step, moment)

    @rank_zero_only
    def save(self) -> None:
        """Bring everything to disk."""
        self._handover.drain()
        super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring everything to disk and close the file."""
        self._handover.drain()
        super().finalize(status)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Show the config as text, and write it beside the events."""
        text = yaml.safe_dump(plain(params), sort_keys=False, allow_unicode=True)
        self.experiment.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        (Path(self.log_dir) / self.NAME_HPARAMS_FILE).write_text(text, encoding="utf-8")

    @rank_zero_only
    def begin_at(self, step: int) -> None:
        """Let readers discard the events of ``step`` and later."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if step > 0:
            self.experiment._get_file_writer().add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Write what is left."""
        self.finalize("success" if exit_code == 0 else "failed")


def plain(params: Any) -> dict[str, Any]:
    """Return the config as plain values, without secrets."""
    values: dict[str, Any] = veil(dict(params) if isinstance(params, Mapping) else dict(vars(params)))
    return values
