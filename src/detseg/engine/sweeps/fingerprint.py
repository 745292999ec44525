"""Telling whether two runs would be the same run: trials that do not differ say nothing about what is swept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError

NOTES = "fingerprints.txt"
"""In a sweep's directory: a line per trial, ``<fingerprint> <trial>``."""

PLACE = "<here>"


def fingerprint(cfg: DictConfig) -> str:
    """Return 16 hexadecimal digits of the resolved config without what says where a run is kept.

    Left out are the run's name and paths, wherever another key repeats them, ``resume``, the settings of a search and
    the callback that prunes.

    Args:
        cfg: from ``load_config()`` or of a run of Hydra's; stays as it is.
    """
    plain = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))  # a copy, free of flags
    for key in list(plain.paths):
        plain.paths[key] = PLACE
    plain.name, plain.resume = PLACE, None
    for key in ("tune", "hydra"):
        plain.pop(key, None)
    if plain.get("callbacks"):
        plain.callbacks.pop("pruning", None)
    content: Any = OmegaConf.to_container(plain, resolve=True)
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def register(sweep: Path, trial: str, digest: str) -> None:
    """Note a trial in its sweep, or refuse it because another one has the same resolved config.

    Trials may register from several processes at a time.

    Args:
        sweep: the sweep's directory.
        trial: what the trial is called; registering it again changes nothing.
        digest: from ``fingerprint``.

    Raises:
        ConfigError: another trial has this fingerprint; names both.
    """
    import fcntl

    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / NOTES).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        file.seek(0)
        known = dict(line.rstrip("\n").split(" ", 1) for line in file if " " in line)
        twin = known.get(digest)
        if twin is None:
            file.write(f"{digest} {trial}\n")
        elif twin != trial:
            raise ConfigError(
                f"the trials {twin} and {trial} have the same resolved config, so they would be one run twice: "
                "what is swept is overridden elsewhere, or two of its values are equal; leave one out"
            )
