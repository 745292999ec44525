"""``detseg tune``: draw, train in a process of its own, tell the study, until enough trials were tried."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError, slug
from detseg.engine.resume import record as note_typed
from detseg.engine.sweeps.fingerprint import fingerprint
from detseg.engine.sweeps.pool import Objective, Order, Pool, slots, visible_gpus
from detseg.engine.sweeps.record import RECORD, TrialRecord, write_record
from detseg.engine.sweeps.space import Value, typed
from detseg.engine.sweeps.study import Ledger, Request, go_on, locate, locked, plain, storage_url, whole
from detseg.engine.sweeps.sweep import Row, Summary, conclude
from detseg.experiment import read_figures, train

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

GRACE = 90.0
"""Seconds that trials have for their checkpoints when the study is asked to end."""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that end the study in good order."""

VOID = "the study was killed while it drew the values"


@dataclass
class _Open:
    """A trial that has not ended."""

    number: int
    values: dict[str, Value]
    cfg: DictConfig
    results: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    twins: list[int] = field(default_factory=list)


def tune(*overrides: str, objective: Objective = train) -> Summary:
    """Search, or go on searching, and sum up; see conf/tune.yaml.

    Args:
        *overrides: as typed after ``detseg tune``: those of ``detseg train``, the sweeps to search over and ``tune.*``.
        objective: what a trial does with its config; found again by its module and name in the trial's process.

    Raises:
        ConfigError: nothing is searched, or a choice does not compose.
        FileNotFoundError: ``resume`` names a directory without a study.
        ImportError: Optuna is not installed.
        SystemExit: a signal ended the study: 130 after Ctrl-C, else 143; 0 on SIGUSR1 in a Slurm job, which is queued
            again. ``resume`` goes on.
    """
    request, directory = locate(overrides)
    with locked(directory):
        request.write(directory)
        log.info("study in %s", directory)
        search = Search(request=request, directory=directory, objective=objective)
        search.run()
        replace(request, finished=search.stopped is None).write(directory)
        summary = search.summary()
    if search.stopped is not None:
        log.warning("stopped; detseg tune resume=%s goes on", directory)
        raise SystemExit(_code(search.stopped))
    return summary


def _code(number: int) -> int:
    """Return the exit code after a signal; on SIGUSR1 in a Slurm job, which is queued again, 0."""
    from detseg.callbacks.signals import code_of, requeue

    return 0 if number == signal.SIGUSR1 and requeue() else code_of(number)


class Search:
    """The loop of a study.

    Args:
        request: what was asked for.
        directory: of the study.
        objective: what a trial does.
    """

    def __init__(self, *, request: Request, directory: Path, objective: Objective) -> None:
        self.request, self.directory, self.objective = request, directory, objective
        base = request.compose()
        self.space, self.settings = request.space(), base.tune
        self.monitor = str(self.settings.monitor or base.task.monitor)
        self.mode = str(self.settings.mode or base.task.mode)
        self.seeds: list[int] = [int(seed) for seed in self.settings.seeds]
        gpus = [] if base.trainer.accelerator == "cpu" else visible_gpus()
        places = slots(self.settings.workers, gpus=gpus, per_trial=int(self.settings.gpus))
        self.ledger = Ledger(
            url=storage_url(self.settings, directory),
            name=request.name,
            space=self.space,
            settings=self.settings,
            mode=self.mode,
            workers=len(places),
        )
        self.pool = Pool(slots=places)
        self.queue: deque[tuple[_Open, int]] = deque()
        self.open: dict[int, _Open] = {}
        self.known: dict[str, int] = {}  # fingerprint -> number of the first trial with it
        self.stopped: int | None = None
        self.began = time.monotonic()

    def run(self) -> None:
        """Go on until enough trials were tried, or a signal comes."""
        try:
            with self._signals():
                self._restore()
                while self.stopped is None and self._fill():
                    for order, record in self.pool.ended(0.5):
                        self._settle(order.directory, record)
                if self.stopped is not None:
                    self._wind_down()
        finally:
            self.pool.close()

    def _fill(self) -> bool:
        """Start what can be started; return whether anything runs."""
        while self.pool.free:
            if self.queue:
                self._start(*self.queue.popleft())
            elif not self._more() or (drawn := self.ledger.draw()) is None:
                break
            else:
                self._admit(*drawn)
        return self.pool.busy > 0

    def _more(self) -> bool:
        limit = self.settings.timeout
        if limit is not None and time.monotonic() - self.began > limit:
            return False
        tried = sum(t.state.name != "WAITING" and t.user_attrs.get("error") != VOID for t in self.ledger.trials())
        return bool(self.settings.sampler == "grid" or tried < self.settings.trials)

    def _restore(self) -> None:
        """Take up the trials of a former session of the study."""
        for trial in self.ledger.trials():
            digest = trial.user_attrs.get("fingerprint")
            if digest is not None:
                self.known.setdefault(digest, trial.number)
        for trial in self.ledger.trials():
            if trial.state.name == "RUNNING" and whole(trial, self.space):
                log.info("trial %d was under way: it goes on", trial.number)
                self._admit(trial.number, dict(trial.params))
            elif trial.state.name == "RUNNING":
                self.ledger.fail(trial.number, VOID)

    def _admit(self, number: int, values: dict[str, Value]) -> None:
        """Queue a trial, unless another one has its config."""
        texts = typed(values)
        try:
            cfg = self.request.compose([*texts, *(f"seed={seed}" for seed in self.seeds[:1])])
        except ConfigError as error:
            self._fail(number, str(error))
            return
        trial = self.open[number] = _Open(number=number, values=values, cfg=cfg)
        digest = fingerprint(cfg)
        twin = self.known.setdefault(digest, number)
        self.ledger.note(number, "fingerprint", digest)
        if twin != number:
            log.warning("trial %d (%s) has the resolved config of trial %d: its value is taken", number, texts, twin)
            self.ledger.note(number, "twin", twin)
            self._follow(number, twin)
            return
        self.queue.append((trial, self.seeds[0] if self.seeds else int(cfg.seed)))

    def _follow(self, number: int, twin: int) -> None:
        """End a trial as its twin ended, or have it wait for that."""
        if twin in self.open:
            self.open[twin].twins.append(number)
            return
        first = self.ledger.trials()[twin]
        self.open.pop(number, None)
        if "values" in first.user_attrs:
            self.ledger.note(number, "values", first.user_attrs["values"])
        if first.state.name == "COMPLETE" and first.value is not None:
            self.ledger.complete(number, first.value)
        elif first.state.name == "PRUNED":
            self.ledger.prune(number)
        else:
            self.ledger.fail(number, f"as trial {twin}: {first.user_attrs.get('error')}")

    def _start(self, trial: _Open, seed: int) -> None:
        """Start one run of a trial, go on with it, or take what it has come to already."""
        texts = [*typed(trial.values), *([f"seed={seed}"] if self.seeds else [])]
        directory = self.directory / slug(",".join(texts))
        ended = TrialRecord.read(directory)
        if ended is not None:  # it ended while the study was dead
            self._settle(directory, ended)
            return
        cfg = self.request.compose(texts) if trial.results else trial.cfg  # that of the first seed
        OmegaConf.update(cfg, "paths.output_dir", str(directory))
        record = TrialRecord(
            parameters={text.partition("=")[0]: text.partition("=")[2] for text in typed(trial.values)},
            seed=seed,
            monitor=self.monitor,
            mode=self.mode,
            number=trial.number,
        )
        figures = read_figures(directory)
        if figures is not None:  # it was killed between its figures and its record
            self._settle(directory, record.finished(figures, seconds=0.0))
            return
        go_on(cfg, directory)
        note_typed(directory, [*self.space.fixed, *texts])  # for detseg train resume=<directory>
        self._add_pruning(cfg, trial.number, first=not trial.results)
        if OmegaConf.select(cfg, "callbacks.shutdown") is not None:
            cfg.callbacks.shutdown.requeue = False  # the study has its job queued again, once for all trials
        self.pool.start(Order(config=plain(cfg), directory=directory, record=record, objective=self.objective))

    def _add_pruning(self, cfg: DictConfig, number: int, *, first: bool) -> None:
        """Let the first run of a trial report and be stopped; those of other seeds follow where it came through."""
        if self.settings.pruner == "none" or not first:
            return
        node = {
            "_target_": "detseg.callbacks.pruning.Pruning",
            "storage": self.ledger.url,
            "study": self.ledger.name,
            "trial": number,
            "monitor": self.monitor,
            "after_trials": self.settings.prune_after_trials,
            "after_epochs": self.settings.prune_after_epochs,
        }
        OmegaConf.update(cfg, "callbacks", {**(cfg.callbacks or {}), "pruning": node}, merge=False, force_add=True)

    def _settle(self, directory: Path, record: TrialRecord) -> None:
        """Take in how one run ended."""
        trial = None if record.number is None else self.open.get(record.number)
        if trial is None:  # another seed of it failed already
            return
        if record.state == "running":
            record = record.failed(str(record.error), seconds=record.seconds)
        elif record.state == "complete" and self.ledger.pruned(trial.number) and not trial.results:
            record = replace(record, state="pruned")
        write_record(directory / RECORD, record)
        trial.seconds += record.seconds
        self.ledger.note(trial.number, "seconds", trial.seconds)
        if record.state == "complete" and record.value is not None:
            self._advance(trial, record.seed, record.value)
        elif record.state == "pruned":
            self.ledger.prune(trial.number)
            self._close(trial, "pruned")
        else:
            self.ledger.fail(trial.number, str(record.error))
            self._close(trial, f"failed: {record.error}")

    def _advance(self, trial: _Open, seed: int, value: float) -> None:
        """Note the value of one seed; the first brings the others, the last ends the trial."""
        trial.results[seed] = value
        self.ledger.note(trial.number, "values", {str(key): result for key, result in trial.results.items()})
        if len(trial.results) == 1:
            self.queue.extendleft((trial, other) for other in reversed(self.seeds[1:]))
        if len(trial.results) == max(1, len(self.seeds)):
            mean = statistics.fmean(trial.results.values())
            self.ledger.complete(trial.number, mean)
            self._close(trial, f"{self.monitor} {mean:.4f}")

    def _fail(self, number: int, error: str) -> None:
        self.ledger.fail(number, error)
        log.warning("trial %d failed: %s", number, error)

    def _close(self, trial: _Open, said: str) -> None:
        """Forget an ended trial, and end those that waited for it."""
        del self.open[trial.number]
        self.queue = deque(item for item in self.queue if item[0] is not trial)
        log.info("trial %d (%s) %s, %.1f s", trial.number, ", ".join(typed(trial.values)), said, trial.seconds)
        for number in trial.twins:
            self._follow(number, trial.number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let a signal end the study in good order; the second one at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.stopped is not None:
                raise KeyboardInterrupt
            self.stopped = number

        try:
            before = {number: signal.signal(number, note) for number in ENDING}
        except ValueError:  # not the main thread, as in some notebooks: signals stay theirs
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wind_down(self) -> None:
        """Let the trials save what they have; they stay open in the study and go on with ``resume``."""
        self.pool.signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        while self.pool.busy and time.monotonic() < until:
            for order, record in self.pool.ended(0.5):
                if record.state != "running":
                    self._settle(order.directory, record)

    def summary(self) -> Summary:
        """Write the table and the pictures, and return what there is."""
        rows = [self._row(trial) for trial in self.ledger.trials() if trial.user_attrs.get("error") != VOID]
        fixed = [text for text in self.space.fixed if text.partition("=")[0] != "seed" or not self.seeds]
        return conclude(
            self.directory, rows, name="trials", monitor=self.monitor, mode=self.mode, fixed=fixed, space=self.space
        )

    def _row(self, trial: FrozenTrial) -> Row:
        state: Any = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running")
        notes = trial.user_attrs
        texts = typed(trial.params)
        value = trial.value if state == "complete" and trial.value is not None else math.nan
        results = notes.get("values", {}) if state == "complete" else {}
        return Row(
            number=trial.number,
            parameters={text.partition("=")[0]: text.partition("=")[2] for text in texts},
            state=state,
            values=tuple(results.values()) or (() if math.isnan(value) else (value,)),
            seeds=tuple(int(seed) for seed in results),
            seconds=notes.get("seconds", 0.0),
            error=notes.get("error"),
            twin=notes.get("twin"),
            directories=tuple(
                slug(",".join([*texts, *seed])) for seed in ([[f"seed={s}"] for s in self.seeds] or [[]])
            ),
        )
