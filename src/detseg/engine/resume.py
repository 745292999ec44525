"""Going on with a run in its own directory: ``resume=<directory>`` and ``resume=auto``.

A run's ``overrides.json`` holds what was typed, a sweep's the same behind ``-m``. To go on, the config is composed
again from it and from what is typed now; ``metrics.json`` marks a run that came to its end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from detseg.atomic import write_atomic
from detseg.config import ConfigError
from detseg.durable import Damaged, check_seal, newest_valid
from detseg.experiment import ENVIRONMENT, FIGURES, Outcome, read_figures
from detseg.secrecy import veil_arguments

log = logging.getLogger(__name__)

TYPED = "overrides.json"
RESOLVED = "resolved.yaml"
BEFORE = "resolved.before.yaml"
"""What a run was until it was gone on with."""
RUNNING = ".running"
"""Locked by the process that trains in a directory."""

SWEEP = ("-m", "--multirun")
_composed: dict[str, list[str]] = {}
"""Run directory -> what was given to ``load_config``."""


def expand(arguments: Sequence[str], *, place: str = "hydra.run.dir") -> list[str]:
    """Return the arguments by which a run goes on, where ``resume`` names its directory or is ``auto``.

    In a job that Slurm started again, a command without ``resume`` goes on with the run that it began there.

    Args:
        arguments: as typed, with flags.
        place: the key that decides where a run lies.

    Raises:
        ConfigError: the directory holds no run, or one that is running.
    """
    typed = [text for text in arguments if _key(text) != "resume"]
    wanted = [text.partition("=")[2].strip("'\"") for text in arguments if _key(text) == "resume"][-1:]
    found = _directory(wanted[0] if wanted else None, typed)
    if found is None:
        return typed if wanted == ["auto"] else list(arguments)
    before = recorded(found, sweep=_is_sweep(typed))
    _check_allowed(before, typed, found)
    if _is_sweep(typed):
        return [*_merged(before, typed), f'hydra.sweep.dir="{found}"']
    checkpoint = _go_on_from(found)
    resume = "resume=null" if checkpoint is None else f'resume="{checkpoint}"'
    return [*_merged(before, typed), f'{place}="{found}"', resume]


def _directory(wanted: str | None, typed: Sequence[str]) -> Path | None:
    """Return the directory that is gone on with, if one is.

    Args:
        wanted: the value of ``resume``; ``None`` where it was not typed.
        typed: the other arguments.
    """
    job = restarted_job()
    if wanted is None and job is not None:  # Slurm types the same command again
        found = latest(typed, job=job)
        if found is not None:
            log.warning("started again by Slurm: going on in %s", found)
        return found
    if wanted == "auto":
        found = latest(typed)
        if found is None:
            log.info("resume=auto: no run of this command is left unfinished; it starts anew")
        return found
    return Path(wanted) if wanted is not None and Path(wanted).is_dir() else None


def _check_allowed(before: Sequence[str], typed: Sequence[str], directory: Path) -> None:
    """Refuse packages that only the run's own file allows: the directory may come from somebody else."""
    allowed = [text for text in before if _key(text).lstrip("+") == "allow"]
    if allowed and not any(_key(text).lstrip("+") == "allow" for text in typed):
        raise ConfigError(
            f"resume={directory}: that run was allowed to call more ({allowed[-1]}); if you trust it, type this again"
        )


def latest(typed: Sequence[str], *, job: str | None = None) -> Path | None:
    """Return the newest directory of the same command whose run has not ended and does not run; of sweeps, any.

    Args:
        typed: the command's arguments.
        job: only what this Slurm job began; ``None``: whoever began it.
    """
    root = next((text.partition("=")[2].strip("'\"") for text in typed if _key(text) == "paths.root"), "runs")
    notes = sorted(Path(root).glob(f"*/*/{TYPED}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for note in notes:
        directory = note.parent
        if sorted(_read(note)) != sorted(_normal(typed)) or (job is not None and job not in _jobs(directory)):
            continue
        if _is_sweep(typed) or not ((directory / FIGURES).exists() or is_running(directory)):
            return directory
    return None


def restarted_job() -> str | None:
    """Return the number of the Slurm job that this process is in, where Slurm has started it before."""
    return os.environ.get("SLURM_JOB_ID") if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 else None


def _jobs(directory: Path) -> set[str]:
    """Return the Slurm jobs that last trained the run in ``directory``, or the trials of the sweep in it."""
    notes = [directory / ENVIRONMENT, *directory.glob(f"*/{ENVIRONMENT}")]
    found = [json.loads(path.read_text(encoding="utf-8")).get("slurm_job") for path in notes if path.is_file()]
    return {job for job in found if job is not None}


def recorded(directory: Path, *, sweep: bool = False) -> list[str]:
    """Return what was typed for the run in ``directory``, or for the sweep.

    Raises:
        ConfigError: there is none, or the other of the two, or one that was not composed from overrides.
    """
    if not (directory / TYPED).is_file():
        known = (directory / RESOLVED).is_file()
        what = "a run that a program configured" if known else "no run"
        raise ConfigError(
            f"resume={directory}: {what} (there is no {TYPED}); give the directory of a run of detseg train, or one of "
            "its checkpoints"
        )
    typed = _read(directory / TYPED)
    if _is_sweep(typed) and not sweep:
        raise ConfigError(f"resume={directory}: a sweep; go on with it by detseg train -m resume={directory}")
    if sweep and not _is_sweep(typed):
        raise ConfigError(f"resume={directory}: one run, not a sweep; go on with it without -m")
    return typed


def record(directory: Path, typed: Sequence[str]) -> None:
    """Write down what was typed."""
    write_atomic(directory / TYPED, json.dumps(_normal(typed), indent=1) + "\n")


def record_run(cfg: DictConfig) -> None:
    """Write down what a run was composed from, as far as it is known: by Hydra, or given to ``load_config``.

    Of a run that goes on, ``resolved.yaml`` is kept under another name.
    """
    directory = str(cfg.paths.output_dir)
    if goes_on(cfg) and (Path(directory) / RESOLVED).is_file():
        shutil.copy(Path(directory) / RESOLVED, Path(directory) / BEFORE)
    typed = _composed.get(directory)
    if typed is None and HydraConfig.initialized() and HydraConfig.get().runtime.output_dir == directory:
        typed = list(HydraConfig.get().overrides.task)
    if typed is not None:
        record(Path(directory), typed)


@contextmanager
def attempt(cfg: DictConfig) -> Iterator[None]:
    """Write down what a run is composed from; see ``record_run``.

    An attempt to go on that fails before it saved anything leaves the run's own files as they were, or the next one
    would be composed from what did not fit.
    """
    directory = Path(cfg.paths.output_dir)
    names = (TYPED, RESOLVED, ENVIRONMENT, FIGURES) if goes_on(cfg) else ()
    before = {path: path.read_text(encoding="utf-8") for name in names if (path := directory / name).is_file()}
    saved = _saved(directory)
    record_run(cfg)
    try:
        yield
    except BaseException:
        if _saved(directory) == saved:
            for path, text in before.items():
                write_atomic(path, text)
        raise


def _saved(directory: Path) -> dict[str, int]:
    """Return when each checkpoint was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("checkpoints/*.ckpt")}


def note_composed(directory: str, overrides: Sequence[str]) -> None:
    """Remember what ``load_config`` was given for the run that will lie in ``directory``."""
    _composed[directory] = [text for text in overrides if _key(text) not in ("paths", "paths.output_dir")]


def goes_on(cfg: DictConfig) -> bool:
    """Say whether a run goes on in the directory in which its checkpoint lies."""
    if cfg.resume is None:
        return False
    return Path(cfg.resume).resolve().parent.parent == Path(cfg.paths.output_dir).resolve()


def requeued(cfg: DictConfig) -> DictConfig:
    """Return the config of a job that Slurm started again: it goes on from the newest checkpoint in its directory."""
    newest = None if restarted_job() is None or goes_on(cfg) else newest_checkpoint(Path(cfg.paths.output_dir))
    if newest is None:
        return cfg
    log.warning("started again by Slurm: going on from %s", newest)
    again = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    again.resume = str(newest)
    return again


def settle_trial(cfg: DictConfig) -> Outcome | None:
    """Return the outcome of a sweep's trial that had come to its end, or let ``cfg`` go on with one that had not."""
    directory = Path(cfg.paths.output_dir)
    if not (directory / RESOLVED).exists():
        return None
    figures = read_figures(directory)
    if figures is not None:
        log.info("%s had come to its end: its figures are taken over", directory)
        return Outcome(directory=directory, figures=figures, monitor=str(cfg.task.monitor).partition("/")[2])
    checkpoint = _go_on_from(directory)
    cfg.resume = None if checkpoint is None else str(checkpoint)
    return None


def say_differences(cfg: DictConfig, directory: Path) -> None:
    """Log which keys of a run that goes on differ from what it was: in its directory, or by its checkpoint's stamp."""
    from detseg.checkpoint import read_stamp

    stays, path = goes_on(cfg), directory / BEFORE
    if stays:
        before = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    else:
        before = read_stamp(cfg.resume).get("config") or {}
    old = dict(_flat(before))
    new = dict(_flat(OmegaConf.to_container(cfg, resolve=True))) if old else {}
    moved = str(old.get("paths.output_dir")), str(new.get("paths.output_dir"))
    own = {"resume"} if stays else {"resume", "name"}  # a branch may well have a name of its own
    for key in sorted((old.keys() | new.keys()) - own):
        was, now = old.get(key), new.get(key)
        if str(was).replace(*moved) != str(now) and "${" not in str(was):
            log.warning("%s goes on with %s=%s, it was %s", directory if stays else cfg.resume, key, now, was)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Mark a directory as one in which this process trains.

    Raises:
        ConfigError: another process does.
    """
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / RUNNING).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the process ends, however it ends
        except BlockingIOError as error:
            raise ConfigError(f"{directory}: another process trains there") from error
        try:
            yield
        finally:
            (directory / RUNNING).unlink(missing_ok=True)


def is_running(directory: Path) -> bool:
    """Say whether a process trains in ``directory``; a file system without locks knows of none."""
    import fcntl

    try:
        with (directory / RUNNING).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest valid checkpoint of the run in ``directory``, and give damaged ones another name.

    Else the next writing would keep one of those as the last but one.
    """
    place = directory / "checkpoints"
    newest = newest_valid(place) if place.is_dir() else None
    for path in place.glob("*.ckpt") if newest is not None else ():
        with suppress(FileNotFoundError):  # another process of the run was faster
            try:
                check_seal(path)
            except Damaged:
                path.rename(path.with_name(f"{path.name}.damaged"))
    return newest


def _go_on_from(directory: Path) -> Path | None:
    """Return the checkpoint from which a run goes on; ``None`` where it died before its first one and starts anew."""
    if is_running(directory):
        raise ConfigError(f"resume={directory}: it is running; wait for its end, or end it")
    newest = newest_checkpoint(directory)
    if newest is None:
        damaged = sorted(path.name for path in directory.glob("checkpoints/*.ckpt*"))
        if damaged:
            raise ConfigError(
                f"resume={directory}: none of its checkpoints can be read ({', '.join(damaged)}); put a whole copy "
                "of one there, or begin anew by the command without resume"
            )
        log.warning("%s had no checkpoint yet: it starts anew", directory)
        (directory / RESOLVED).unlink(missing_ok=True)
    return newest


def _merged(before: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Return the overrides of both, flags first; of those with one key, what is typed now."""
    again, typed = {_key(text) for text in typed}, flag_first(typed)
    flags = list(takewhile(_is_flag, typed))
    kept = [text for text in before if _key(text) not in again and text not in SWEEP]
    return [*flags, *kept, *typed[len(flags) :]]


def flag_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a sweep's flag before all others: argparse takes overrides in one piece alone."""
    return [*(text for text in arguments if text in SWEEP), *(text for text in arguments if text not in SWEEP)]


def _normal(typed: Sequence[str]) -> list[str]:
    """Return overrides as they are compared: without ``resume``, a sweep's flag first."""
    kept = [text for text in typed if _key(text) != "resume" and not text.startswith(("-", "hydra."))]
    return [*(["-m"] if _is_sweep(typed) else []), *veil_arguments(kept)]  # Hydra's list gives out secrets resolved


def _is_flag(text: str) -> bool:
    """Say whether an argument is a flag of Hydra's, or a flag's value."""
    return text.startswith("-") or "=" not in text


def _is_sweep(typed: Sequence[str]) -> bool:
    return any(text in SWEEP for text in typed)


def _key(text: str) -> str:
    """Return an override's key with its package; of a flag, the flag."""
    if text.startswith("-") or "=" not in text:
        return text
    try:
        return str(OverridesParser.create().parse_override(text).get_key_element())
    except HydraException:  # composing says what is wrong with it
        return text.partition("=")[0]


def _read(path: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [str(text) for text in content] if isinstance(content, list) else []


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))
