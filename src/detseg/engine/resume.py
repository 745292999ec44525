"""Going on with a run in its own directory: ``resume=<directory>`` and ``resume=auto``.

A run's ``overrides.json`` holds what was typed, a sweep's the same behind ``-m``. To go on, the config is composed
again from it and from what is typed now; ``metrics.json`` marks a run that came to its end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError
from detseg.durable import Damaged, check_seal, newest_valid
from detseg.secrecy import veil_arguments

if TYPE_CHECKING:
    from detseg.experiment import Outcome

log = logging.getLogger(__name__)

TYPED = "overrides.json"
RESOLVED = "resolved.yaml"
BEFORE = "resolved.before.yaml"
"""What a run was until it was gone on with."""
FIGURES = "metrics.json"
RUNNING = ".running"
"""Locked by the process that trains in a directory."""

SWEEP = ("-m", "--multirun")
_composed: dict[str, list[str]] = {}
"""Run directory -> what was given to ``load_config``."""


def expand(arguments: Sequence[str], *, place: str = "hydra.run.dir") -> list[str]:
    """Return the arguments by which a run goes on, where ``resume`` names its directory or is ``auto``.

    Args:
        arguments: as typed, with flags.
        place: the key that decides where a run lies.

    Raises:
        ConfigError: the directory holds no run, or one that is running.
    """
    typed = [text for text in arguments if _key(text) != "resume"]
    wanted = [text.partition("=")[2].strip("'\"") for text in arguments if _key(text) == "resume"]
    if not wanted:
        return list(arguments)
    if wanted[-1] == "auto":
        found = latest(typed)
        if found is None:
            log.info("resume=auto: no run of this command is left unfinished; it starts anew")
            return typed
    elif Path(wanted[-1]).is_dir():
        found = Path(wanted[-1])
    else:
        return list(arguments)
    if _is_sweep(typed):
        return [*typed, f'hydra.sweep.dir="{found}"']
    before = recorded(found)
    _check_allowed(before, typed, found)
    return [*_merged(before, typed), f'{place}="{found}"', f"resume={_checkpoint(found)}"]


def _check_allowed(before: Sequence[str], typed: Sequence[str], directory: Path) -> None:
    """Refuse packages that only the run's own file allows: the directory may come from somebody else."""
    allowed = [text for text in before if _key(text).lstrip("+") == "allow"]
    if allowed and not any(_key(text).lstrip("+") == "allow" for text in typed):
        raise ConfigError(
            f"resume={directory}: that run was allowed to call more ({allowed[-1]}); if you trust it, type this again"
        )


def latest(typed: Sequence[str]) -> Path | None:
    """Return the newest directory of the same command whose run has not ended and does not run; of sweeps, any."""
    root = next((text.partition("=")[2].strip("'\"") for text in typed if _key(text) == "paths.root"), "runs")
    notes = sorted(Path(root).glob(f"*/*/{TYPED}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for note in notes:
        same = sorted(_read(note)) == sorted(_normal(typed))
        if same and (_is_sweep(typed) or not ((note.parent / FIGURES).exists() or is_running(note.parent))):
            return note.parent
    return None


def recorded(directory: Path) -> list[str]:
    """Return what was typed for the run in ``directory``.

    Raises:
        ConfigError: there is no run, or it is a sweep, or one that was not composed from overrides.
    """
    if not (directory / TYPED).is_file():
        known = (directory / RESOLVED).is_file()
        what = "a run that a program configured" if known else "no run"
        raise ConfigError(
            f"resume={directory}: {what} (there is no {TYPED}); give the directory of a run of detseg train, or one of "
            "its checkpoints"
        )
    typed = _read(directory / TYPED)
    if _is_sweep(typed):
        raise ConfigError(f"resume={directory}: a sweep; type its command again with resume=auto")
    return typed


def record(directory: Path, typed: Sequence[str]) -> None:
    """Write down what was typed."""
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f".{TYPED}.{os.getpid()}"
    beside.write_text(json.dumps(_normal(typed), indent=1) + "\n", encoding="utf-8")
    beside.replace(directory / TYPED)


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
    directory = Path(cfg.paths.output_dir) / "checkpoints"
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 or not directory.is_dir() or goes_on(cfg):
        return cfg
    newest = newest_valid(directory)
    if newest is None:
        return cfg
    log.warning("started again by Slurm: going on from %s", newest)
    again = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    again.resume = str(newest)
    return again


def settle_trial(cfg: DictConfig) -> Outcome | None:
    """Return the outcome of a sweep's trial that had come to its end, or let ``cfg`` go on with one that had not."""
    from detseg.experiment import Outcome

    directory = Path(cfg.paths.output_dir)
    if not (directory / RESOLVED).exists():
        return None
    if (directory / FIGURES).exists():
        log.info("%s had come to its end: its figures are taken over", directory)
        figures = json.loads((directory / FIGURES).read_text(encoding="utf-8"))
        values = {name: math.nan if value is None else value for name, value in figures.items()}
        return Outcome(directory=directory, figures=values, monitor=str(cfg.task.monitor).partition("/")[2])
    checkpoint = _checkpoint(directory)
    cfg.resume = None if checkpoint == "null" else checkpoint.strip('"')
    return None


def say_differences(cfg: DictConfig, directory: Path) -> None:
    """Log which keys of a run that goes on differ from what it was."""
    if not (directory / BEFORE).is_file():
        return
    before = dict(_flat(OmegaConf.to_container(OmegaConf.load(directory / BEFORE), resolve=False)))
    after = dict(_flat(OmegaConf.to_container(cfg, resolve=True)))
    for key in sorted(before.keys() | after.keys() - {"resume"}):
        old, new = before.get(key), after.get(key)
        if old != new and key != "resume" and "${" not in str(old):
            log.warning("%s goes on with %s=%s, it was %s", directory, key, new, old)


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


def _checkpoint(directory: Path) -> str:
    """Return the value of ``resume`` for a run in ``directory``; ``null`` where it died before its first checkpoint."""
    if is_running(directory):
        raise ConfigError(f"resume={directory}: it is running; wait for its end, or end it")
    place = directory / "checkpoints"
    newest = newest_valid(place) if place.is_dir() else None
    if newest is not None:
        _set_aside(place)
        return f'"{newest}"'
    log.warning("%s has no checkpoint that could be read: it starts anew", directory)
    (directory / RESOLVED).unlink(missing_ok=True)
    return "null"


def _set_aside(place: Path) -> None:
    """Give damaged checkpoints another name, or the next writing would keep one as the last but one."""
    for path in place.glob("*.ckpt"):
        try:
            check_seal(path)
        except Damaged:
            path.rename(path.with_name(f"{path.name}.damaged"))


def _merged(before: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Return the overrides of both; of those with one key, what is typed now."""
    again = {_key(text) for text in typed}
    return [*(text for text in before if _key(text) not in again), *typed]


def _normal(typed: Sequence[str]) -> list[str]:
    """Return overrides as they are compared: without ``resume``, a sweep's flag first."""
    kept = [text for text in typed if _key(text) != "resume" and not text.startswith(("-", "hydra."))]
    return [*(["-m"] if _is_sweep(typed) else []), *veil_arguments(kept)]  # Hydra's list gives out secrets resolved


def _is_sweep(typed: Sequence[str]) -> bool:
    return any(text in SWEEP for text in typed)


def _key(text: str) -> str:
    """Return an override's key with its package; of a flag, the flag."""
    if text.startswith("-") or "=" not in text:
        return text
    return str(OverridesParser.create().parse_override(text).get_key_element())


def _read(path: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [str(text) for text in content] if isinstance(content, list) else []


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))
