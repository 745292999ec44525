"""What a checkpoint says about itself: how to rebuild its model, what its labels mean, where it came from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, run
from typing import Any

from torch import Tensor

from detseg.secrecy import veil

STAMP_KEY = "detseg"
"""The stamp's key in a Lightning checkpoint."""

STAMP_FORMAT = 1
"""Grows when a reader of the stamp would have to change."""

PACKAGES = ("detseg", "torch", "torchvision", "lightning", "timm", "segmentation-models-pytorch", "hydra-core", "numpy")


def make_stamp(
    config: Mapping[str, Any] | None,
    *,
    class_names: Sequence[str] | None,
    category_ids: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Return the stamp, of plain values only, so that the file loads with ``weights_only=True``.

    Its keys: ``format``, ``config`` (whole, resolved), ``model`` (its node, with the number of classes filled in),
    ``eval_transform``, ``size_divisor``, ``truth``, ``class_names``, ``category_ids``, ``versions``, ``commit``.

    Args:
        config: the resolved config, or ``None``.
        class_names: by label.
        category_ids: the data set's own ids by label; default 0..K-1.
        num_classes: what the model was built with; overrides the config's, which may be ``null``.

    Raises:
        TypeError: a value is neither plain nor a tensor; the message says where it is.
    """
    whole = None if config is None else veil(plain(config, "config"))
    model = None if whole is None else dict(whole.get("model") or {})
    if model is not None and num_classes is not None:
        model["num_classes"] = int(num_classes)
    data = (whole or {}).get("data") or {}
    names = None if class_names is None else [str(name) for name in class_names]
    ids = list(range(len(names))) if category_ids is None and names is not None else category_ids
    return {
        "format": STAMP_FORMAT,
        "config": whole,
        "model": model,
        "eval_transform": data.get("eval_transform"),
        "size_divisor": data.get("size_divisor"),
        "truth": (whole or {}).get("truth"),
        "class_names": names,
        "category_ids": None if ids is None else [int(number) for number in ids],
        "versions": versions(),
        "commit": running_commit(),
    }


def plain(value: Any, where: str) -> Any:
    """Return ``value`` with mappings as dicts, sequences as lists and paths as text.

    Raises:
        TypeError: something else is inside; such a checkpoint would not load with ``weights_only=True``.
    """
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence):
        return [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint must not hold; give numbers, text, lists and dicts "
        "(a DictConfig: OmegaConf.to_container(config, resolve=True))"
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a checkpoint means."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def running_commit() -> str | None:
    """Return the commit of the package's own code; git is asked once, for what runs was read when the run began."""
    return git_commit(Path(__file__).resolve().parent)


def git_commit(place: Path) -> str | None:
    """Return the commit of a work tree, with ``-dirty`` after it where files have changed.

    Args:
        place: any directory of the work tree. ``None`` comes back where it is none (an installed wheel), or git is
            missing.
    """
    try:
        tracked = run(
            ["git", "ls-files", "--error-unmatch", "."], cwd=place, stdout=DEVNULL, stderr=DEVNULL, timeout=10
        )
        if tracked.returncode:  # a .venv inside somebody's repository: that commit says nothing about this code
            return None
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        commit, changes = (
            run(command, cwd=place, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
            for command in commands
        )
    except (OSError, SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit
