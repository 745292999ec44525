"""Composing configs and building what they describe, from a notebook, a test or the command line."""

from __future__ import annotations

import datetime as dt
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from detseg.allow import CONFIG_RULES, RefusedTarget, check_all, prepare, rules_for
from detseg.secrecy import remember
from detseg.suggest import explain

if TYPE_CHECKING:
    import lightning as L

    from detseg.data.module import DetectionData
    from detseg.tasks.base import Task

log = logging.getLogger(__name__)

CONFIG_MODULE = "detseg.conf"
"""Where the YAML files lie: found in a wheel and in an editable install alike."""


class ConfigError(ValueError):
    """A config cannot be composed or built; the message names the key and the remedy."""


@dataclass
class Run:
    """What a config describes: plain Lightning objects, ready for ``run.trainer.fit(run.task, run.data)``.

    Attributes:
        cfg: the resolved config, with the number of classes filled in from the data.
        data: the data module.
        task: the Lightning module around the model.
        trainer: with the callbacks and loggers of the config.
    """

    cfg: DictConfig
    data: DetectionData
    task: Task
    trainer: L.Trainer


def load_config(*overrides: str, name: str = "train") -> DictConfig:
    """Compose a config from the same files as the command line does.

    Args:
        *overrides: as typed after ``detseg train``, such as ``"model=fcos_small"`` or ``"trainer.max_epochs=1"``.
        name: the file in ``conf`` to start from: ``"train"``, ``"evaluate"`` or ``"predict"``.

    Returns:
        The config, in struct mode: a key that does not exist cannot be set. ``paths.output_dir`` is a directory of its
        own at every call, below ``runs`` in the current directory.

    Raises:
        ConfigError: an override names no key or choice; the message gives the nearest ones.
    """
    register_resolvers()
    overrides = tuple(quoted(overrides))
    if name == "train":
        from detseg.engine.resume import expand

        overrides = tuple(expand(overrides, place="paths.output_dir"))
    with _hydra(name):
        try:
            cfg = compose(name, ["paths=notebook", *overrides], return_hydra_config=True)
            frozen = {"name": str(cfg.name), "paths.output_dir": str(cfg.paths.output_dir)}
        except (HydraException, OmegaConfBaseException) as error:
            raise config_error(error, overrides, name=name) from error
    with open_dict(cfg):
        del cfg["hydra"]
    for key, value in frozen.items():
        OmegaConf.update(cfg, key, value)
    if name == "train":
        from detseg.engine.resume import note_composed

        note_composed(frozen["paths.output_dir"], overrides)
    return cfg


def config_error(error: Exception, overrides: Sequence[str], *, name: str = "train") -> ConfigError:
    """Turn Hydra's or OmegaConf's error into one that names the nearest keys or choices.

    Args:
        error: what composing raised.
        overrides: as typed.
        name: the file in ``conf`` that was composed.
    """
    said: str | None = None
    try:
        with _hydra(name):
            known = compose(name, return_hydra_config=True).hydra.runtime.choices
            groups = {path: names for path, names in config_groups().items() if _is_choice(path, known)}
            said = explain(
                overrides, compose=lambda choices: compose(name, ["paths=notebook", *choices]), groups=groups
            )
    except (HydraException, OmegaConfBaseException):
        log.debug("no suggestion, the rest does not compose either", exc_info=True)
    cause = error.__cause__
    detail = f" ({str(cause).splitlines()[0]})" if isinstance(cause, OmegaConfBaseException) else ""
    return ConfigError(said or f"{str(error).strip()}{detail}")


def quoted(arguments: Sequence[str]) -> list[str]:
    """Put quotes round values that Hydra's grammar has no place for, such as paths with ``=``, brackets or ``é``.

    A sweep names its directories after its overrides, so such paths come from our own runs. What Hydra can read, and
    lists, dicts and calls that are misspelt, stay as they are.
    """
    return [_quote(text) if not text.startswith("-") else text for text in arguments]


def _quote(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or not value or value[0] in "\"'[{(" or re.match(r"\w+\(", value):
        return text
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        escaped = value.replace('"', '\\"')
        return f'{key}="{escaped}"'
    return text


@contextmanager
def _hydra(name: str) -> Iterator[None]:
    """Initialise Hydra for composing, also inside a run of Hydra's, which is as before afterwards."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module=CONFIG_MODULE, version_base="1.3", job_name=name):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def config_groups() -> dict[str, list[str]]:
    """Return every config group with its choices; Hydra must be initialised."""
    loader = GlobalHydra.instance().config_loader()
    groups: dict[str, list[str]] = {}
    pending = [""]
    while pending:
        parent = pending.pop()
        for name in loader.list_groups(parent):
            path = f"{parent}/{name}" if parent else name
            groups[path] = loader.get_group_options(path, ObjectType.CONFIG)
            pending.append(path)
    return {path: choices for path, choices in groups.items() if choices}


def _is_choice(group: str, known: Iterable[str]) -> bool:
    """Say whether a verb's config chooses from ``group``; its choices are named ``group`` or ``group@package``."""
    return any(str(name).partition("@")[0] == group for name in known)


def check_targets(node: Any, *, allow: Sequence[str] = (), path: str = "") -> None:
    """Raise unless every ``_target_`` in ``node`` names something allowed; nothing is called.

    Args:
        node: a config or plain container.
        allow: packages allowed beside detseg's own list, such as ``("mypackage",)``.
        path: key of ``node``, for messages.

    Raises:
        ConfigError: a target is not allowed or does not exist; the message names its key.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        check_all(plain, rules_for(allow, CONFIG_RULES), path)
    except (RefusedTarget, ImportError) as error:
        raise ConfigError(str(error)) from error


def instantiate(node: Any, *, allow: Sequence[str] = (), path: str = "", **objects: Any) -> Any:
    """Build what ``node`` describes after checking all its targets.

    Args:
        node: a config with ``_target_``.
        allow: packages allowed beside detseg's own list, such as ``("mypackage",)``.
        path: key of ``node``, for messages.
        **objects: arguments that are built already and pass as they are.

    Returns:
        The object, or for ``_partial_: true`` a callable that waits for the rest of its arguments. Containers arrive
        as plain dicts and lists.

    Raises:
        ConfigError: a target is not allowed, or an argument does not fit it.
    """
    if "_target_" not in node:
        raise ConfigError(
            f"{path} has no _target_: numbers are set for something that is not chosen (or is misspelt); choose its "
            f"group's file, as in callbacks=[default,ema], or remove it with {path}=null"
        )
    missing = sorted(OmegaConf.missing_keys(node)) if OmegaConf.is_config(node) else []
    if missing:
        raise ConfigError(f"{', '.join(missing)} has no default: give {missing[0]}=...")
    # Resolved once: what is checked is what is built, whatever an interpolation might say a second time.
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check_targets(plain, allow=allow, path=path)
    try:
        waiting = prepare(plain, rules_for(allow, CONFIG_RULES))
        return waiting if plain.get("_partial_") else waiting(**objects)
    except TypeError as error:
        raise ConfigError(f"{path} ({plain['_target_']}): {error}") from error


def build(cfg: DictConfig) -> Run:
    """Build the data, the model, its task and the trainer that ``cfg`` describes, in this order.

    The number of classes comes from the data, so that the model is built with what the files hold.
    ``cfg`` itself stays as it is; ``run.cfg`` is the resolved copy.

    Raises:
        ConfigError: the config asks for something that does not exist or does not fit.
    """
    from lightning import seed_everything

    cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))  # a copy, free of flags
    allow = list(cfg.allow)
    check_targets(_without_interpolated(OmegaConf.to_container(cfg)), allow=allow)  # all, before the first is called
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: DetectionData = instantiate(cfg.data, allow=allow, path="data")
    cfg.data.num_classes = data.num_classes
    OmegaConf.resolve(cfg)
    task = build_task(cfg, class_names=data.class_names)
    data.proposer = getattr(task.model, "proposer", None)
    return Run(cfg=cfg, data=data, task=task, trainer=build_trainer(cfg))


def _without_interpolated(node: Any) -> Any:
    """Return plain values without targets that refer to other keys: those are known, and checked, when it is built."""
    if isinstance(node, dict):
        left = {key: _without_interpolated(value) for key, value in node.items()}
        return left if "${" not in str(node.get("_target_")) else list(left.values())
    return [_without_interpolated(item) for item in node] if isinstance(node, list) else node


def build_task(cfg: DictConfig, *, class_names: Sequence[str]) -> Task:
    """Build the model and the task around it from a resolved config; ``class_names`` are the data's, by label."""
    from detseg.checkpoint import init_from
    from detseg.engine.rates import scaled, scaling

    allow = list(cfg.allow)
    model = instantiate(cfg.model, allow=allow, path="model")
    if cfg.init_from is not None:
        init_from(model, Path(cfg.init_from), drop_head=cfg.drop_head)
    scheduler = None if cfg.scheduler is None else instantiate(cfg.scheduler, allow=allow, path="scheduler")
    optimizer = instantiate(cfg.optimizer, allow=allow, path="optimizer")
    optimizer = scaled(optimizer, scaling(cfg, optimizer))
    names = list(class_names)
    task: Task = instantiate(
        cfg.task, allow=allow, path="task", model=model, optimizer=optimizer, scheduler=scheduler, class_names=names
    )
    return task


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """Build the trainer with its callbacks and loggers from a resolved config, without those that are ``null``."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ProgressBar

    from detseg.callbacks import CheckpointStamp, DurableIO

    allow = list(cfg.allow)
    parts: dict[str, list[Any]] = {
        group: [
            instantiate(node, allow=allow, path=f"{group}.{key}")
            for key, node in (cfg.get(group) or {}).items()
            if node is not None
        ]
        for group in ("callbacks", "logger")
    }
    for callback in parts["callbacks"]:
        if isinstance(callback, CheckpointStamp):
            callback.config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    if cfg.trainer.enable_progress_bar is None:  # Lightning would bring its own where none is asked for
        cfg.trainer.enable_progress_bar = any(isinstance(callback, ProgressBar) for callback in parts["callbacks"])
    own_precision = _precision(cfg)
    try:
        trainer: L.Trainer = instantiate(
            OmegaConf.merge(cfg.trainer, {"precision": None}) if own_precision else cfg.trainer,
            allow=allow,
            path="trainer",
            callbacks=parts["callbacks"],
            logger=parts["logger"] or False,
            plugins=[DurableIO(), *own_precision],
        )
    except MisconfigurationException as error:
        remedy = "; there is none that PyTorch can use: choose trainer=cpu" if "gpu backend" in str(error) else ""
        raise ConfigError(f"trainer: {str(error).rstrip('!')}{remedy}") from error
    return trainer


def _precision(cfg: DictConfig) -> list[Any]:
    """Return our own plugin in the place of Lightning's, which would round the boxes, for weights in 16 bits.

    Raises:
        ConfigError: the weights would be in float16.
    """
    if cfg.trainer.precision == "16-true":
        raise ConfigError("trainer.precision=16-true loses small gradients; choose bf16-true or 16-mixed")
    if cfg.trainer.precision != "bf16-true":
        return []
    import torch

    from detseg.engine.half import HalfWeights

    gpu = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
    return [HalfWeights(device="cuda" if gpu else "cpu")]


def register_resolvers() -> None:
    """Teach OmegaConf ``detseg.run_id``, ``detseg.slug``, ``detseg.choice``; have secrets and Hydra's part watched.

    Calling it again changes nothing.
    """
    from detseg.engine.hydra_points import guard_hydra

    guard_hydra()
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    OmegaConf.register_new_resolver("detseg.run_id", run_id, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("detseg.slug", slug, replace=True)
    OmegaConf.register_new_resolver("detseg.choice", _choice, replace=True)


def _environment(key: str, *default: str | None) -> Any:
    """Return what OmegaConf's own ``oc.env`` does; a secret's value is known from then on."""
    value = oc.env(key, *default)
    if key in os.environ:
        remember(key, str(value))
    return value


def run_id() -> str:
    """Return the time and four random letters, such as ``2026-11-20_14-03-59_k3f9``, for a directory of its own."""
    letters = "".join(secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(4))
    return f"{dt.datetime.now():%Y-%m-%d_%H-%M-%S}_{letters}"


def slug(text: str) -> str:
    """Return ``text`` as the name of one directory: no slashes, at most 120 characters and still told apart."""
    import hashlib

    name = re.sub(r"[^\w.,=+@-]+", "_", text).strip("_") or "default"
    if len(name) <= 120 and name == text:
        return name
    return f"{name[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _choice(group: str, *, _root_: DictConfig) -> str:
    """Return what was chosen of a config group, while composing or in a run of Hydra's."""
    choices = _root_.hydra.runtime.choices if "hydra" in _root_ else HydraConfig.get().runtime.choices
    return str(choices[group])
