"""Which names a config or a checkpoint may call, and calling them.

A config from elsewhere is data: it must not be able to start anything but the building of models, data, optimisers,
trainers and what watches them. So every ``_target_`` is looked up, the object found is held against the rules below,
and that very object is called; nothing looks the name up a second time.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

CLASSES, FUNCTIONS, ANY, NOTHING = "classes", "classes and functions", "anything", "nothing"
"""What may be called below a prefix. Only ``ANY`` reaches methods: a class method such as ``load_from_checkpoint``
reads files, and where one is wanted the user has named the package."""

EXPORTED = "classes and exported functions"
"""Functions only directly below the prefix: what the package itself offers, not the helpers of its modules."""

Rules = Mapping[str, str]
"""From a prefix that ends in a dot, or one exact name, to what may be called there; the longest that fits decides."""

MODEL_RULES: Rules = {
    "detseg.data.": CLASSES,
    "detseg.data.parcel.": NOTHING,  # unpickles what workers send
    "detseg.losses.": FUNCTIONS,
    "detseg.metrics.": CLASSES,
    "detseg.models.": FUNCTIONS,
    "detseg.models.catalogue.": NOTHING,  # composes configs
    "detseg.models.torchvision_weights.": NOTHING,  # downloads
    "detseg.nn.": FUNCTIONS,
    "detseg.nn.weights.": NOTHING,  # reads files
    "detseg.ops.": FUNCTIONS,
    "detseg.structures.": CLASSES,
    "detseg.targets.": FUNCTIONS,
    "detseg.tasks.": FUNCTIONS,
    "segmentation_models_pytorch.": CLASSES,
    "segmentation_models_pytorch.create_model": FUNCTIONS,
    "segmentation_models_pytorch.datasets.": NOTHING,  # downloads and unpacks
    "timm.create_model": FUNCTIONS,
    "timm.models._factory.create_model": FUNCTIONS,  # where the same function was defined
    "timm.layers.": FUNCTIONS,
    "timm.models.": FUNCTIONS,
    "torch.nn.": CLASSES,
    "torch.nn.functional.": FUNCTIONS,
    "torch.nn.init.": FUNCTIONS,
    "torchvision.models.": FUNCTIONS,
    "torchvision.ops.": FUNCTIONS,
    "torchvision.transforms.": FUNCTIONS,
}
"""What ``detseg.load`` calls for a checkpoint: our own parts and the libraries that models are built from."""

CONFIG_RULES: Rules = {
    **MODEL_RULES,
    "detseg.callbacks.": EXPORTED,
    "detseg.engine.processes.sharding.ShardedStrategy": CLASSES,
    "lightning.Trainer": CLASSES,
    "lightning.pytorch.Trainer": CLASSES,
    "lightning.pytorch.trainer.trainer.Trainer": CLASSES,
    "lightning.pytorch.callbacks.": CLASSES,
    "lightning.pytorch.loggers.": CLASSES,
    "lightning.pytorch.plugins.": CLASSES,
    "lightning.pytorch.profilers.": CLASSES,
    "lightning.pytorch.strategies.": CLASSES,
    "torch.optim.": CLASSES,
}
"""What a config of ``detseg train`` may call: what a checkpoint may, and what surrounds a model in training."""

REFUSED_ARGUMENTS = {
    "timm.": {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"},
    "segmentation_models_pytorch.": {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"},
    "lightning.pytorch.loggers.": {"experiment", "settings"},
}
"""Arguments by which an allowed class reads a file that may hold a pickle, or is told which program to run."""

HUB = re.compile(r"hf[-_]hub|local-dir", re.IGNORECASE)
"""In a model's name timm reads these as "fetch config and weights from there"."""

HUB_READERS = ("timm.", "segmentation_models_pytorch.", "detseg.nn.", "detseg.models.smp.")
"""Whose arguments may become such a name."""

SPECIAL = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


class RefusedTarget(ValueError):
    """A ``_target_`` lies outside the allowed packages, leads out of them, or has an argument that does."""


def rules_for(allow: Sequence[str], base: Rules = MODEL_RULES) -> Rules:
    """Return the rules with the user's own packages added.

    Args:
        allow: names such as ``"mypackage"`` or ``"mypackage.models"``; anything in them may be called.
        base: to be extended.

    Raises:
        RefusedTarget: a name belongs to the standard library, to detseg or to something that detseg depends on: those
            hold functions that run, load or delete what they are told to.
    """
    rules = dict(base)
    for name in allow:
        text = str(name).removesuffix(".")
        if name is None or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", text):
            raise RefusedTarget(f"allow: {name!r} is no package's name; give one such as mypackage")
        top = text.partition(".")[0]
        if top in sys.stdlib_module_names or top == "detseg" or top in dependency_modules():
            raise RefusedTarget(
                f"allow: {text} belongs to the standard library, to detseg or to its dependencies and cannot be "
                "allowed, as a config could then run anything; put a class or function of your own around what you need"
            )
        rules[f"{text}."] = ANY
    return rules


@functools.cache
def dependency_modules() -> frozenset[str]:
    """Return the top-level modules of all that detseg depends on, with extras, as far as it is installed."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, requires

    found, pending = set(), ["detseg"]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        names = (re.match(r"[\w.-]+", text) for text in texts)
        pending += [_normal(match.group()) for match in names if match]
    return frozenset(
        module
        for module, owners in packages_distributions().items()
        if any(_normal(owner) in found for owner in owners)
    ) | {"hydra_plugins", "pip", "pkg_resources", "setuptools"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_target(path: str, rules: Rules = MODEL_RULES) -> Any:
    """Import what a ``_target_`` names, after checking every step of the way.

    The text of the path is not enough: ``detseg.data.image.os.system`` begins well. So every module on the way, and
    the module in which the object found was defined, must lie in an allowed place too.

    Args:
        path: dotted path of a class or function, such as ``"torch.nn.ReLU"``.
        rules: what may be called where.

    Returns:
        The class or function (of the user's own packages: also a method).

    Raises:
        RefusedTarget: the path, a module on the way or the object's own module is not allowed, or the object is not of
            the kind that may be called there.
        ImportError: nothing has that name.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise RefusedTarget(f"_target_ {path!r} is refused: it is no dotted path of a class or function")
    for name in path.split("."):
        if name.startswith("_") and path not in rules:
            raise RefusedTarget(f"_target_ {path!r} is refused: {name!r} is not a public name")
    kind = _kind(path, path, "it", rules)
    found: Any = importlib.import_module(path.partition(".")[0])
    walked = found.__name__
    for name in path.split(".")[1:]:
        if kind != ANY and not isinstance(found, ModuleType):
            raise RefusedTarget(f"_target_ {path!r} is refused: {name!r} is an attribute of {walked}, not of a module")
        walked = f"{walked}.{name}"
        found = _step(found, name, walked)
        if isinstance(found, ModuleType):
            _check_module(path, found, walked, rules)
    _check_object(path, found, kind, rules)
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


def _check_module(path: str, module: ModuleType, walked: str, rules: Rules) -> None:
    """Refuse a module on the way that is neither allowed nor above something allowed, as torch is above torch.nn."""
    name = f"{module.__name__}."
    if not any(key.startswith(name) for key in rules):
        _kind(path, name, f"the module {module.__name__} (at {walked})", rules)


def _check_object(path: str, found: Any, kind: str, rules: Rules) -> None:
    """Refuse what is not of the right kind, and what was defined elsewhere and merely imported there."""
    if isinstance(found, ModuleType) or not callable(found):
        raise RefusedTarget(f"_target_ {path!r} is refused: it is {type(found).__name__}, not a class or a function")
    origin = getattr(found, "__module__", None) or type(found).__module__
    subject = f"the module {origin}, in which it was defined,"
    own = _kind(path, f"{origin}.{getattr(found, '__name__', '')}", subject, rules)
    if any(part.startswith("_") for part in origin.split(".")) and ANY not in (kind, own) and path not in rules:
        raise RefusedTarget(f"_target_ {path!r} is refused: {subject} is not public")
    if inspect.isclass(found) or ANY in (kind, own):
        return
    exported = kind == EXPORTED and path.count(".") == 2
    if not inspect.isfunction(found) or not (exported or kind == FUNCTIONS):
        raise RefusedTarget(f"_target_ {path!r} is refused: there only {kind} may be called")


def _kind(path: str, name: str, subject: str, rules: Rules) -> str:
    """Return what the longest rule that fits ``name`` allows; refuse where that is nothing."""
    fitting = [key for key in rules if name == key or (key.endswith(".") and name.startswith(key))]
    kind = rules[max(fitting, key=len)] if fitting else NOTHING
    if kind == NOTHING:
        places = sorted({key.split(".")[0] for key in rules})
        raise RefusedTarget(
            f"_target_ {path!r} is refused: {subject} is not among what a config or checkpoint may call (parts of "
            f"models, data and training from {', '.join(places)}). A package of your own is allowed by name, on the "
            "command line or in detseg.load: allow=[mypackage]"
        )
    return kind


def check_arguments(path: str, target: Callable[..., Any], node: Mapping[str, Any]) -> None:
    """Refuse arguments by which an allowed target would read a pickle or run a program.

    Args:
        path: the target's, for messages.
        target: what it names.
        node: its config, plain.
    """
    origin = f"{getattr(target, '__module__', '')}."
    names = _argument_names(target, node)
    for prefix, refused in REFUSED_ARGUMENTS.items():
        if wrong := sorted(names & refused if origin.startswith(prefix) else set()):
            raise RefusedTarget(
                f"_target_ {path!r} is refused with the argument {wrong[0]}: it names files or programs that could run "
                "code. Give weights as a plain state dict through weights=, init_from= or detseg.nn.load_weights"
            )
    if origin.startswith(HUB_READERS):
        for text in _texts({key: value for key, value in node.items() if key != "_target_"}):
            if HUB.search(text):
                raise RefusedTarget(
                    f"_target_ {path!r} is refused with {text!r}: config and weights would come from there"
                )


def _argument_names(target: Callable[..., Any], node: Mapping[str, Any]) -> set[str]:
    """Return the names of a node's arguments, of positional ones too."""
    names = {str(key) for key in node} - set(SPECIAL)
    count = len(node.get("_args_") or [])
    if count:
        try:
            names |= set(list(inspect.signature(target).parameters)[:count])
        except (TypeError, ValueError) as error:  # no signature: nobody knows what they mean
            raise RefusedTarget(f"{target!r}: positional arguments in _args_ cannot be checked; name them") from error
    return names


def _texts(node: Any) -> Iterator[str]:
    """Yield every text inside plain values, outside nested targets."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping) and "_target_" not in node:
        yield from (text for value in node.values() for text in _texts(value))
    elif isinstance(node, list | tuple):
        yield from (text for value in node for text in _texts(value))


def check_all(node: Any, rules: Rules = MODEL_RULES, path: str = "") -> None:
    """Check every target inside plain values, wherever it hides, and its arguments; nothing is called.

    Raises:
        RefusedTarget: one is not allowed; the message begins with its key.
        ImportError: one does not exist; likewise.
    """
    if isinstance(node, Mapping) and "_target_" in node:
        try:
            check_arguments(str(node["_target_"]), check_target(node["_target_"], rules), node)
        except (RefusedTarget, ImportError) as error:
            raise type(error)(f"{path or 'config'}: {error}") from error
    items = list(node.items() if isinstance(node, Mapping) else enumerate(node if isinstance(node, list) else []))
    for key, child in items:
        check_all(child, rules, f"{path}.{key}" if path else str(key))


def build_plain(node: Any, rules: Rules = MODEL_RULES) -> Any:
    """Build what plain values describe, calling allowed targets only; all are checked before the first is called.

    Args:
        node: a dict with ``_target_`` becomes the result of the call, with ``_partial_: true`` a
            ``functools.partial``. ``_args_`` are positional. Nothing is interpolated.
        rules: what may be called where.

    Raises:
        RefusedTarget: a target or an argument is not allowed.
        TypeError: a call does not take its arguments; the message names the target.
    """
    check_all(node, rules)
    return _build(node, rules)


def _build(node: Any, rules: Rules) -> Any:
    if isinstance(node, list):
        return [_build(item, rules) for item in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _build(value, rules) for key, value in node.items()}
    waiting = prepare(node, rules)
    if node.get("_partial_"):
        return waiting
    try:
        return waiting()
    except TypeError as error:
        raise TypeError(f"{node['_target_']}({', '.join(waiting.keywords)}): {error}") from error


def prepare(node: Mapping[str, Any], rules: Rules) -> functools.partial[Any]:
    """Return the call that a node describes, with its arguments built, for more arguments to come."""
    target = check_target(node["_target_"], rules)
    arguments = {key: _build(value, rules) for key, value in node.items() if key not in SPECIAL}
    return functools.partial(target, *_build(node.get("_args_") or [], rules), **arguments)
