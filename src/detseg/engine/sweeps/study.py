"""A study: what was asked for, and what Optuna's storage knows of its trials."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from detseg.atomic import write_atomic
from detseg.config import ConfigError, load_config
from detseg.engine.resume import newest_checkpoint, restarted_job
from detseg.engine.sweeps.pool import LOG
from detseg.engine.sweeps.space import Choice, Space, Value, read_space, typed
from detseg.secrecy import veil_arguments
from detseg.storage import PRUNED, open_storage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

STUDY = "study.json"


@dataclass(frozen=True)
class Request:
    """What a study was started with; ``study.json``.

    Attributes:
        overrides: as typed, without ``resume`` and the ``tune`` keys.
        settings: the ``tune`` keys as typed.
        name: of the study in its storage.
        finished: it came to its end.
    """

    overrides: tuple[str, ...]
    settings: tuple[str, ...]
    name: str = ""
    finished: bool = False

    @classmethod
    def read(cls, directory: Path) -> Request:
        """Return the request of the study in ``directory``.

        Raises:
            FileNotFoundError: there is none.
        """
        path = directory / STUDY
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no study (no {STUDY}); give the one that detseg tune named")
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {key: tuple(content[key]) for key in ("overrides", "settings")}
        return cls(**lists, name=content["name"], finished=content["finished"])

    def write(self, directory: Path) -> None:
        """Write it, whole or not at all."""
        write_atomic(directory / STUDY, json.dumps(asdict(self), indent=1) + "\n")

    def space(self) -> Space:
        """Return what is searched."""
        return read_space(self.overrides)

    def compose(self, values: Sequence[str] = ()) -> DictConfig:
        """Return the config of a trial with the ``tune`` keys, for overrides that were drawn.

        Raises:
            ConfigError: it does not compose; the message names the nearest keys or choices.
        """
        return load_config(*self.space().fixed, *self.settings, *values, name="tune")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a study's directory, so that one process at a time searches in it; the system lets go when it ends.

    Raises:
        ConfigError: another process holds it.
    """
    import fcntl

    place = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"another detseg tune is at work in {directory}; raise its tune.workers instead") from error
    finally:
        os.close(place)


def locate(overrides: Sequence[str]) -> tuple[Request, Path]:
    """Return what is asked for and the directory of its study, which exists then.

    ``resume=auto``, or Slurm when it starts a job again, goes on with the newest unfinished study of the same command.
    """
    keys = {text: text.partition("=")[0].lstrip("+") for text in veil_arguments(overrides)}
    resume = [text.partition("=")[2] for text, key in keys.items() if key == "resume"]
    request = Request(
        overrides=tuple(text for text, key in keys.items() if key != "resume" and not key.startswith("tune.")),
        settings=tuple(text for text, key in keys.items() if key.startswith("tune.")),
    )
    target = resume[-1] if resume and resume[-1] != "null" else None
    if target not in (None, "auto"):
        return _continued(request, Path(str(target)))
    cfg = _checked(request)
    before = latest(Path(cfg.paths.root), request)
    if before is not None and (target == "auto" or restarted_job() is not None):
        return _continued(request, before)
    if before is not None:
        log.info("an unfinished study of this command is in %s: resume=auto goes on with it", before)
    directory = Path(cfg.paths.output_dir)
    directory.mkdir(parents=True)
    return replace(request, name=directory.name), directory


def _continued(request: Request, directory: Path) -> tuple[Request, Path]:
    """Return the request of a study that is gone on with; its space stays, its settings may change."""
    former = Request.read(directory)
    if request.overrides and request.overrides != former.overrides:
        raise ConfigError(
            f"resume={directory}: that study searches {' '.join(former.overrides)}; only tune.* may change in it"
        )
    allowed = [text for text in former.overrides if text.partition("=")[0].lstrip("+") == "allow"]
    if allowed and not request.overrides:  # the directory may come from somebody else
        raise ConfigError(
            f"resume={directory}: that study was allowed to call more ({allowed[-1]}); if you trust it, type its whole "
            f"command again: {' '.join(former.overrides)}"
        )
    merged = replace(former, settings=(*former.settings, *request.settings), finished=False)
    _checked(merged)
    return merged, directory


def _checked(request: Request) -> DictConfig:
    """Return the config without what is drawn, after composing every choice once: errors come before trials."""
    space = request.space()
    if not space.dimensions:
        raise ConfigError(
            "nothing is searched: give some key several values, as in 'optimizer.lr=tag(log,interval(1e-4,1e-2))' or "
            "'model=choice(fcos_small,retinanet_small)'"
        )
    wrong = [key for key in space.dimensions if key.startswith(("tune.", "paths.", "resume", "allow", "hydra"))]
    if wrong or any(text.startswith("sweep=") for text in space.fixed):
        raise ConfigError(f"{', '.join(wrong) or 'sweep=...'} cannot be searched; a search takes its own sweeps alone")
    cfg = request.compose()
    if cfg.tune.seeds and "seed" in space.dimensions:
        raise ConfigError("seed is searched and tune.seeds repeats every trial; give one of them")
    if cfg.tune.sampler not in ("tpe", "random", "grid"):
        raise ConfigError(f"tune.sampler={cfg.tune.sampler}: choose tpe, random or grid")
    if cfg.tune.sampler == "grid":
        space.grid()
    if cfg.tune.pruner not in ("median", "none"):
        raise ConfigError(f"tune.pruner={cfg.tune.pruner}: choose median or none")
    _check_figures([request.compose(typed(row)) for row in _every_choice(space)])
    return cfg


def _check_figures(trials: Sequence[DictConfig]) -> None:
    """Raise where trials of one study would optimise different figures."""
    figures = sorted({f"{cfg.task.monitor} ({cfg.task.mode})" for cfg in trials})
    if len(figures) > 1 and not (trials[0].tune.monitor and trials[0].tune.mode):
        raise ConfigError(
            f"the choices optimise different figures, {' and '.join(figures)}, which cannot be compared: search them "
            "apart, or set tune.monitor and tune.mode to one that all of them have, such as val/loss and min"
        )


def _every_choice(space: Space) -> Iterator[dict[str, Value]]:
    """Yield values in which every choice of every dimension occurs."""
    columns = {
        key: list(dimension.values) if isinstance(dimension, Choice) else [_number(dimension.low, dimension.step)]
        for key, dimension in space.dimensions.items()
    }
    for i in range(max(len(column) for column in columns.values())):
        yield {key: column[i % len(column)] for key, column in columns.items()}


def _number(value: float, step: int | None) -> Value:
    return float(value) if step is None else int(value)


def latest(root: Path, request: Request) -> Path | None:
    """Return the newest unfinished study below ``root`` that was asked for with the same overrides, if there is one."""
    found = sorted(root.glob(f"*/*/{STUDY}"), key=lambda path: path.parent.name, reverse=True)
    for path in found:
        other = Request.read(path.parent)
        if other.overrides == request.overrides and not other.finished:
            return path.parent
    return None


class Ledger:
    """The trials of a study in Optuna's storage, by their numbers.

    Args:
        url: of the storage.
        name: of the study there.
        space: what is searched.
        settings: the ``tune`` keys.
        mode: ``"max"`` or ``"min"``.
        workers: runs at a time.

    Raises:
        ImportError: Optuna is not installed.
        ConfigError: the storage cannot be opened.
    """

    def __init__(self, *, url: str, name: str, space: Space, settings: DictConfig, mode: str, workers: int) -> None:
        self._storage: Any = _open(url)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url, self.name, self.space, self.settings = url, name, space, settings
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
        )
        self._place = self._storage.get_study_id_from_name(name)
        self.study.sampler = _sampler(settings, drawn=len(self.trials()), workers=workers)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def draw(self) -> tuple[int, dict[str, Value]] | None:
        """Start a trial; return its number and values, or ``None`` where a grid has no combination left."""
        if self.settings.sampler == "grid" and not self._queue_combination():
            return None
        trial = self.study.ask(self.space.distributions())
        return trial.number, dict(trial.params)

    def _queue_combination(self) -> bool:
        """Have the next trial drawn be the first combination that no trial has; return whether there is one."""
        seen = [dict(trial.params) for trial in self.trials()]
        if any(trial.state.name == "WAITING" for trial in self.trials()):
            return True  # queued by a session that was killed before it could draw it
        combination = next((values for values in self.space.grid() if values not in seen), None)
        if combination is not None:
            self.study.enqueue_trial(combination)
        return combination is not None

    def note(self, number: int, key: str, value: Any) -> None:
        """Keep something about a trial that has not ended."""
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def complete(self, number: int, value: float) -> None:
        """End a trial with its value."""
        self.study.tell(number, value, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """End a trial as one that was stopped early."""
        self._end(number, "PRUNED")

    def fail(self, number: int, error: str) -> None:
        """End a trial as failed."""
        self.note(number, "error", error)
        self._end(number, "FAIL")

    def pruned(self, number: int) -> bool:
        """Say whether a trial's own process stopped it."""
        return PRUNED in self._storage.get_trial(self._id(number)).user_attrs

    def _end(self, number: int, state: str) -> None:
        from optuna.trial import TrialState

        self.study.tell(number, state=TrialState[state], skip_if_finished=True)

    def _id(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._place, number))


def whole(trial: FrozenTrial, space: Space) -> bool:
    """Say whether all values of a trial were drawn; a study killed in between leaves some out."""
    return set(trial.params) == set(space.dimensions)


def storage_url(settings: DictConfig, directory: Path) -> str:
    """Return the URL of the storage: as the settings say, or of a file in the study's directory."""
    return str(settings["storage"] or f"sqlite:///{(directory / 'study.db').absolute()}")


def _open(url: str) -> Any:
    try:
        return open_storage(url)
    except ImportError:
        raise
    except Exception as error:  # SQLAlchemy's and its drivers' own kinds
        scheme = url.partition(":")[0]  # the rest may hold a password
        raise ConfigError(f"tune.storage={scheme}:...: it cannot be opened ({type(error).__name__})") from error


def _sampler(settings: DictConfig, *, drawn: int, workers: int) -> Any:
    """Build the sampler; its seed moves on with the trials, or a resumed study would draw its first ones again."""
    import optuna

    seed = (int(settings.seed) * 1_000_003 + drawn) % 2**32  # NumPy takes no larger one
    if settings.sampler in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():  # constant_liar: an experiment in Optuna 4, the default in 5
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=settings.startup, constant_liar=workers > 1)


def go_on(cfg: DictConfig, directory: Path) -> None:
    """Let a run that was killed go on in its directory: behind its newest valid checkpoint, or anew if it has none.

    Args:
        cfg: of the run; gets ``resume``.
        directory: the run's.
    """
    newest = newest_checkpoint(directory)
    if newest is not None:
        cfg.resume = str(newest)
        return
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name != LOG:  # nothing that was saved: it died before its first checkpoint
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a trial's config without the ``tune`` keys, with its interpolations: it travels to another process."""
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items() if key != "tune"}
