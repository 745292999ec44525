"""Weights & Biases and MLflow: one run per training run, gone on with where that goes on, and told how it ended.

Both need a third of a millisecond and more for a row of figures, so rows are handed to a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from detseg.atomic import write_atomic
from detseg.callbacks.handover import Handover, Row
from detseg.callbacks.loggers import plain

log = logging.getLogger(__name__)

CLOSED = {0: "FINISHED", 130: "KILLED", 143: "KILLED"}  # else FAILED, in MLflow's words


class Identity:
    """Who a run is to its trackers: where it lies below the root of all runs, and its ids, kept in its directory.

    Args:
        directory: the run's own directory.
        root: directory of all runs.
    """

    def __init__(self, directory: str | Path, root: str | Path) -> None:
        self.directory = Path(directory)
        self._file = self.directory / "trackers.json"
        place, top = self.directory.resolve(), Path(root).resolve()
        self._parts = (place.relative_to(top).parts if place.is_relative_to(top) else ()) or place.parts[-2:]

    @property
    def name(self) -> str:
        """What tells the run from its neighbours: a trial's overrides, or ``<name>/<id>``."""
        return self._parts[-1] if self.group is not None else "/".join(self._parts)

    @property
    def group(self) -> str | None:
        """The sweep's directory below the root where the run is a trial, else ``None``."""
        return "/".join(self._parts[:-1]) if len(self._parts) > 2 else None

    def read(self, tracker: str) -> str | None:
        """Return the id that ``tracker`` gave the run, if it has one."""
        if not self._file.exists():
            return None
        value: str | None = json.loads(self._file.read_text(encoding="utf-8")).get(tracker)
        return value

    def write(self, tracker: str, value: str) -> None:
        """Keep an id."""
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, json.dumps({**known, tracker: value}, indent=1) + "\n")

    def derived(self) -> str:
        """Return an id that follows from the directory alone, of 16 letters and digits."""
        return hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:16]


class WandbLog(WandbLogger):
    """Weights & Biases, one run per run directory; see ``wandb_logger`` for the arguments."""

    def __init__(self, *, identity: Identity, offline: bool, log_model: bool, **init: Any) -> None:
        super().__init__(
            save_dir=str(identity.directory),
            offline=offline,
            log_model=log_model and not offline,
            mode="offline" if offline else None,  # Lightning sets a variable alone, which wandb.login has read already
            **init,
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's; wandb warns that it means nothing any more
        self._identity, self._offline = identity, offline
        self._handover = Handover(self._store)

    @property
    def experiment(self) -> Any:
        """The run of wandb, begun or gone on with when first asked for; does nothing but on the first process."""
        if self._experiment is None and first_process():
            known = self._identity.read("wandb")
            self._wandb_init |= {"id": known or self._identity.derived(), "resume": known and "allow"}
            self._identity.directory.mkdir(parents=True, exist_ok=True)
            run = super().experiment
            if known is None:
                self._identity.write("wandb", self._wandb_init["id"])
            return run
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Send the config."""
        self.experiment.config.update(plain(params), allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand a row of figures over; pictures are sent at once, after the rows before them."""
        if all(isinstance(value, int | float) for value in metrics.values()):
            _ = self.experiment  # begun here, not in the thread
            self._handover.put(metrics, step)
            return
        self._handover.drain()
        super().log_metrics(metrics, step)

    def _store(self, rows: list[Row]) -> None:
        for metrics, step, _ in rows:
            place = {} if step is None else {"trainer/global_step": step}
            self.experiment.log({**metrics, **place})

    @rank_zero_only
    def save(self) -> None:
        """Wait for the rows handed over."""
        self._handover.drain()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait for the rows handed over, and send checkpoints where wanted."""
        self._handover.drain()
        super().finalize(status)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End wandb's run with the exit code of ours."""
        if self._experiment is not None:
            self._handover.drain()
            place = Path(self._experiment.dir).parent  # beside files/, what wandb syncs
            self._experiment.finish(exit_code=exit_code)
            if self._offline:
                log.info("wandb is offline; to send this run: wandb sync %s", place)


class MlflowLog(MLFlowLogger):
    """MLflow, one run per run directory, all in one SQLite store, so that they compare.

    Several processes may write into the store at a time: they take turns by a lock file beside it.

    Args:
        save_dir: the run's directory.
        root: directory of all runs; the store lies in it.
        experiment_name: runs of one name are listed together.
        run_name: name in the list; ``None``: the run's directory below ``root``, of a trial its overrides.
        tracking_uri: another store than ``<root>/mlflow.db``, such as a server's address.
        artifact_location: directory of the pictures; ``None``: ``<root>/mlflow_artifacts``.
        log_model: copy checkpoints into the store.
    """

    def __init__(
        self,
        *,
        save_dir: str | Path,
        root: str | Path,
        experiment_name: str = "detseg",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        log_model: bool = False,
    ) -> None:
        top = Path(root).resolve()
        self._identity, self._lock_file = Identity(save_dir, root), top / "mlflow.lock"
        tags = {"directory": str(Path(save_dir))}
        group = self._identity.group
        with self._turn():  # the store's tables are made here, which two processes must not do at a time
            _quiet_mlflow()
            super().__init__(
                experiment_name=experiment_name,
                run_name=run_name or self._identity.name,
                tracking_uri=tracking_uri or f"sqlite:///{top / 'mlflow.db'}",
                tags=tags if group is None else {**tags, "sweep": group},
                artifact_location=artifact_location or str(top / "mlflow_artifacts"),
                log_model=log_model,
            )
        self._handover = Handover(self._store)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def experiment(self) -> Any:
        """MLflow's client; the run is begun or gone on with when first asked for, on the first process alone."""
        if self._initialized or not first_process():
            return super().experiment
        with self._turn():
            known = self._identity.read("mlflow")
            self._run_id = known if known is not None and self._exists(known) else None
            goes_on = self._run_id is not None
            client = super().experiment
            if goes_on:
                client.update_run(self._run_id, status="RUNNING")
            else:
                self._identity.write("mlflow", str(self._run_id))
        return client

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._mlflow_client.get_run(run_id))
        except MlflowException:
            return False

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Store the config; what a continued run has changed becomes a tag, as MLflow's parameters never change."""
        from lightning.fabric.utilities.logger import _flatten_dict
        from mlflow.entities import Param, RunTag

        client, run_id = self.experiment, self.run_id
        values = {str(name): str(value)[:6000] for name, value in _flatten_dict(plain(params)).items()}  # its limit
        with self._turn():
            known = client.get_run(run_id).data.params
            new = [Param(name, value) for name, value in values.items() if name not in known]
            changed = [RunTag(f"changed/{n}", v[:5000]) for n, v in values.items() if known.get(n, v) != v]
            for start in range(0, max(len(new), len(changed)), 100):  # its limit for one call
                stop = start + 100
                client.log_batch(run_id, params=new[start:stop], tags=changed[start:stop])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand a row of figures over."""
        _ = self.experiment  # begun here, not in the thread
        self._handover.put(metrics, step)

    def _store(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        client, run_id = self.experiment, self.run_id
        found = [
            Metric(metric_name(name), float(value), round(moment * 1000), step or 0)
            for metrics, step, moment in rows
            for name, value in metrics.items()
            if not isinstance(value, str)
        ]
        for start in range(0, len(found), 1000):  # its limit for one call
            with self._turn():
                client.log_batch(run_id, metrics=found[start : start + 1000])

    @rank_zero_only
    def save(self) -> None:
        """Wait for the rows handed over."""
        self._handover.drain()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Wait for the rows handed over, and mark the run as ended."""
        self._handover.drain()
        with self._turn():
            super().finalize(status)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Mark the run as finished, failed or killed."""
        if not self._initialized:
            return
        self._handover.drain()
        with self._turn():
            self._mlflow_client.set_terminated(str(self._run_id), CLOSED.get(exit_code, "FAILED"))


def first_process() -> bool:
    """Say whether this process is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def metric_name(name: str) -> str:
    """Return ``name`` with what MLflow does not know in a name, such as brackets, as underscores."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def _quiet_mlflow() -> None:
    """Leave out that tables and experiments are made where there are none yet."""
    import mlflow  # it sets its loggers' levels when it is imported

    assert mlflow
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)


def wandb_logger(
    *,
    save_dir: str | Path,
    root: str | Path = "runs",
    project: str = "detseg",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    offline: bool | None = None,
    log_model: bool = False,
    system_interval: float = 10.0,
) -> WandbLog:
    """Return a Weights & Biases logger that works without a login: the run then stays on disk.

    The run of the logger that this function returned before is closed: Lightning would go on with it, and all trials
    of a sweep would end up in one run.

    Args:
        save_dir: the run's directory, in which ``wandb/`` is made.
        root: directory of all runs.
        project: project on the dashboard.
        name: the run's name there; ``None``: its directory below ``root``, of a trial its overrides.
        group: runs of one group are shown together; ``None``: the trials of a sweep are one.
        tags: words to find the run by.
        offline: true or false decides; ``None`` is offline unless there is a login.
        log_model: send checkpoints too; left out where the run is offline, which wandb does not allow.
        system_interval: seconds between two readings of processor, memory and GPU.
    """
    import wandb

    if offline is None:
        offline = not has_wandb_login()
    _close_last()
    identity = Identity(save_dir, root)
    logger = WandbLog(
        identity=identity,
        offline=offline,
        log_model=log_model,
        project=project,
        name=name or identity.name,
        group=group or identity.group,
        tags=list(tags),
        # Offline it has twenty lines to say, of which ``close`` says the one that helps; online its links are wanted.
        settings=wandb.Settings(x_stats_sampling_interval=system_interval, silent=offline),
    )
    _returned[:] = [logger]
    return logger


_returned: list[WandbLog] = []
"""The logger returned last."""


def _close_last() -> None:
    """Close its run, unless it never began or was closed already."""
    import wandb

    if wandb.run is not None and any(logger._experiment is wandb.run for logger in _returned):
        wandb.finish()


def has_wandb_login() -> bool:
    """Return whether wandb knows an account and may use it; looks at its settings, never at the network."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
