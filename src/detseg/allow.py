"""Which names a checkpoint may call: a file from elsewhere must not be able to start anything else."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ALLOWED_PREFIXES = ("detseg.", "torch.nn.", "torchvision.", "timm.", "segmentation_models_pytorch.")
"""What ``detseg.load`` instantiates: our own parts and the libraries that models are built from."""

REFUSED_PREFIXES = (
    "detseg.checkpoint.",
    "detseg.cli.",
    "detseg.config.",
    "detseg.evaluation.",
    "detseg.experiment.",
    "detseg.prediction.",
    "detseg.predictor.",
    "detseg.results.",
    "detseg.visualize.",
    "timm.data.",
    "timm.models._helpers.",
    "timm.models._hub.",
    "timm.utils.",
    "torchvision.datasets.",
    "torchvision.io.",
    "torchvision.utils.",
)
"""Inside those, what reads, writes or downloads files, or starts whole runs, instead of building a part of a model."""


class RefusedTarget(ValueError):
    """A ``_target_`` lies outside the allowed packages, or leads out of them."""


def check_target(path: str, allowed_prefixes: Sequence[str] = ALLOWED_PREFIXES) -> Any:
    """Import what a ``_target_`` names, after checking every step of the way.

    The text of the path is not enough: ``detseg.data.image.os.system`` begins well. So every module on the way, and
    the module in which the object found was defined, must lie under an allowed prefix too.

    Args:
        path: dotted path of a class or function, such as ``"torch.nn.ReLU"``.
        allowed_prefixes: what it may begin with, each ending in a dot.

    Returns:
        The class, function or method.

    Raises:
        RefusedTarget: the path, a module on the way or the object's own module is not allowed, or the object cannot be
            called.
        ImportError: nothing has that name.
    """
    _check_prefix(path, path, "it", allowed_prefixes)
    found: Any = importlib.import_module(path.partition(".")[0])
    walked = found.__name__
    for name in path.split(".")[1:]:
        walked = f"{walked}.{name}"
        if name.startswith("__"):
            raise RefusedTarget(f"_target_ {path!r} is refused: {name!r} is not a public name")
        found = _step(found, name, walked)
        above = any(prefix.startswith(f"{walked}.") for prefix in allowed_prefixes)  # such as torch, above torch.nn
        if isinstance(found, ModuleType) and not above:
            _check_prefix(path, f"{found.__name__}.", f"the module {found.__name__} (at {walked})", allowed_prefixes)
    _check_object(path, found, allowed_prefixes)
    return found


def _step(parent: Any, name: str, walked: str) -> Any:
    """Return the attribute or submodule ``name`` of ``parent``."""
    if not hasattr(parent, name) and isinstance(parent, ModuleType):
        try:
            return importlib.import_module(f"{parent.__name__}.{name}")
        except ModuleNotFoundError as error:
            raise ImportError(f"_target_: {parent.__name__} has no {name!r} (looking for {walked})") from error
    try:
        return getattr(parent, name)
    except AttributeError as error:
        raise ImportError(f"_target_: {parent!r} has no {name!r} (looking for {walked})") from error


def _check_object(path: str, found: Any, allowed_prefixes: Sequence[str]) -> None:
    """Refuse what cannot be called, and a class or function that was defined elsewhere and merely imported there."""
    if isinstance(found, ModuleType) or not callable(found):
        raise RefusedTarget(f"_target_ {path!r} is refused: it is {type(found).__name__}, not a class or a function")
    origin = getattr(found, "__module__", None) or type(found).__module__
    _check_prefix(path, f"{origin}.", f"the module {origin}, in which it was defined,", allowed_prefixes)


def _check_prefix(path: str, name: str, subject: str, allowed_prefixes: Sequence[str]) -> None:
    """Refuse ``name`` unless it lies under an allowed prefix and under no refused one."""
    if not name.startswith(tuple(allowed_prefixes)) or name.startswith(REFUSED_PREFIXES):
        raise RefusedTarget(
            f"_target_ {path!r} is refused: {subject} must lie under {', '.join(allowed_prefixes)} "
            f"and not under {', '.join(REFUSED_PREFIXES)}. Build such a model by hand and load its weights with "
            "detseg.nn.load_weights."
        )
