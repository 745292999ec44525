"""What Hydra itself would run for a config, refused before Hydra acts on it.

Hydra builds its launcher, its sweeper and its callbacks from ``_target_``, hands ``job_logging`` to Python's logging
(whose ``()`` calls anything and whose file handlers append to any file), imports packages named by
``hydra.searchpath`` and sets environment variables that decide which libraries are loaded. All of that happens before
the first line of ours, so the config is looked at where Hydra has just composed it. Only runs that compose detseg's
own files are looked at; another program's Hydra in the same process is left alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detseg.config import CONFIG_MODULE, ConfigError, check_targets

PLUGINS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)
"""Launchers and sweepers of Hydra's that may run: other machines and searches are detseg's own business."""

HANDLERS = ("logging.FileHandler", "logging.NullHandler", "logging.StreamHandler")
STREAMS = ("ext://sys.stderr", "ext://sys.stdout")
FORMATTERS = ("colorlog.ColoredFormatter", "logging.Formatter")
LOG_FILE = "${hydra.runtime.output_dir}/"
"""Where a log file may lie: a handler appends, and what it appends is in the config too."""

VARIABLES = re.compile(
    r"(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|CUDA_LAUNCH_BLOCKING"
    r"|PYTORCH_CUDA_ALLOC_CONF|PYTORCH_ALLOC_CONF|(NCCL|GLOO)_SOCKET_IFNAME|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE)"
    r"|WANDB_(MODE|DISABLED|SILENT)|DETSEG_\w+|HYDRA_FULL_ERROR"
)
"""What ``hydra.job.env_set`` may set: numbers and switches, nothing from which code is loaded."""

FLAGS = {
    *("-h", "--help", "--hydra-help", "-m", "--multirun", "-r", "--run", "-c", "--cfg", "--resolve", "-p", "--package"),
    *("-i", "--info", "-cd", "--config-dir", "--version"),
}
"""Hydra's flags that are passed on. ``--experimental-rerun`` unpickles a file; ``--config-path`` and ``--config-name``
would replace detseg's own files, which ``--config-dir`` adds to."""


def guard_hydra() -> None:
    """Let every config that Hydra composes from detseg's files be checked first; calling it again changes nothing."""
    original = ConfigLoaderImpl.load_configuration
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_configuration(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        ours = any(part.path == f"pkg://{CONFIG_MODULE}" for part in self.config_search_path.get_path())
        if ours:
            check_search_path(overrides)
        cfg = original(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if ours:
            check_allow(cfg, overrides, str(config_name))
            check_hydra(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]  # Hydra has no hook here


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of Hydra's that load something else than detseg's configs.

    Raises:
        ConfigError: names the flag.
    """
    for text in arguments:
        flag = text.partition("=")[0]
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigError(
                f"there is no flag {flag}; known are {', '.join(sorted(FLAGS))} (a directory of your own configs: "
                "--config-dir)"
            )


def check_search_path(overrides: Sequence[str]) -> None:
    """Refuse packages in ``hydra.searchpath``, which Hydra would import; directories may be given.

    Raises:
        ConfigError: names the package.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.get_key_element().lstrip("+~") == "hydra.searchpath":
            value = override.value()
            for place in value if isinstance(value, list) else [value]:
                if str(place).startswith("pkg:") and not str(place).startswith(f"pkg://{CONFIG_MODULE}"):
                    raise ConfigError(f"hydra.searchpath: {place} would be imported; give a directory: file://...")


def check_allow(cfg: DictConfig, overrides: Sequence[str], name: str) -> None:
    """Refuse packages that were allowed by a file: whoever wrote it would allow themselves what they like.

    Args:
        cfg: composed, with Hydra's own part.
        overrides: as typed.
        name: the file in ``conf`` that was composed; what stands in it, in the user's own checkout, counts.

    Raises:
        ConfigError: names the package, and what to type.
    """
    from importlib.resources import files

    given = _plain(cfg.get("allow"), "allow") or []
    typed = OverridesParser.create().parse_overrides(list(overrides))
    if not given or any(override.get_key_element().lstrip("+") == "allow" for override in typed):
        return
    own: Any = OmegaConf.load(str(files(CONFIG_MODULE).joinpath(f"{name.removesuffix('.yaml')}.yaml")))
    if given != list(own.get("allow") or []):
        raise ConfigError(
            f"allow={given} comes from a file; what a config may call is for you to say: if you trust its author, "
            f"type allow=[{','.join(map(str, given))}]"
        )


def check_hydra(cfg: DictConfig) -> None:
    """Refuse what Hydra itself would call, write or import for a composed config.

    Args:
        cfg: with Hydra's own part, as ``hydra``.

    Raises:
        ConfigError: names the key and what may stand there.
    """
    hydra = cfg.hydra
    for key in ("launcher", "sweeper"):
        _check_plugin(_plain(hydra.get(key), f"hydra.{key}"), f"hydra.{key}")
    check_targets(_plain(hydra.get("callbacks"), "hydra.callbacks"), path="hydra.callbacks")
    for key in ("job_logging", "hydra_logging"):
        _check_logging(_plain(hydra.get(key), f"hydra.{key}", resolve=False), f"hydra.{key}")
    for key in hydra.job.get("env_set") or {}:
        if not VARIABLES.fullmatch(str(key)):
            raise ConfigError(
                f"hydra.job.env_set.{key}: set this variable where you type the command; from a config only threads, "
                "devices and switches are taken"
            )
    for key, name in {"job.name": hydra.job.get("name"), "output_subdir": hydra.get("output_subdir")}.items():
        if name is not None and not re.fullmatch(r"\w[\w-]*|\.\w[\w-]*", str(name)):
            raise ConfigError(f"hydra.{key}={name}: the name of a file or directory in the run, letters and digits")


def _plain(node: Any, path: str, *, resolve: bool = True) -> Any:
    """Return a node as plain values; whatever cannot be resolved here would say something else later."""
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: cannot be resolved before a run, so nobody knows what it calls ({error})"
        ) from error


def _check_plugin(node: Any, path: str) -> None:
    """Refuse a launcher or sweeper that is not Hydra's basic one, and anything to be built for its arguments."""
    if node is None:
        return
    if not isinstance(node, Mapping) or node.get("_target_") not in PLUGINS:
        shown = node.get("_target_") if isinstance(node, Mapping) else node
        raise ConfigError(f"{path}: {shown} is not run; choose launcher=..., or detseg tune for a search")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    if nested := _find(arguments, "_target_", path):
        raise ConfigError(f"{nested}: a launcher or sweeper takes numbers and texts, nothing to be built")
    for key in node.get("params") or {}:
        if re.match(r"[+~]*(hydra\b|allow\b)", str(key)):
            raise ConfigError(f"{path}.params.{key}: hydra.* and allow are not swept; type them for the whole sweep")


def _find(node: Any, name: str, path: str) -> str | None:
    """Return where a key ``name`` stands inside plain values, or ``None``."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == name:
            return path
        if found := _find(value, name, f"{path}.{key}"):
            return found
    return None


def _check_logging(node: Any, path: str) -> None:
    """Refuse what Python's logging would call or write outside the run's directory."""
    if node is None:
        return
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path}: {node!r} is no description of handlers; see conf/hydra/default.yaml")
    if node.get("filters"):
        raise ConfigError(f"{path}.filters: none are built from a config")
    for name, formatter in (node.get("formatters") or {}).items():
        for key in ("()", "class", "validate"):
            if isinstance(formatter, str) or formatter.get(key, FORMATTERS[0]) not in (*FORMATTERS, True, False):
                raise ConfigError(f"{path}.formatters.{name}: choose among {', '.join(FORMATTERS)}")
        _check_texts(formatter, f"{path}.formatters.{name}")
    for name, handler in (node.get("handlers") or {}).items():
        _check_handler(handler, f"{path}.handlers.{name}")
    rest = {key: value for key, value in node.items() if key not in ("formatters", "handlers")}
    _check_texts(rest, path)


def _check_handler(handler: Any, path: str) -> None:
    """Refuse a handler of another class than the three plain ones, or one that writes outside the run."""
    if isinstance(handler, str) or "()" in handler or handler.get("class") not in HANDLERS:
        raise ConfigError(f"{path}: choose a class among {', '.join(HANDLERS)}")
    filename = handler.get("filename")
    if filename is not None:
        inside = str(filename).removeprefix(LOG_FILE).replace("${hydra.job.name}", "train")
        if not str(filename).startswith(LOG_FILE) or not re.fullmatch(r"\w[\w-]*(\.\w+)*", inside):
            raise ConfigError(f"{path}.filename={filename}: a log lies in its run: {LOG_FILE}<name>.log")
    _check_texts({key: value for key, value in handler.items() if key != "filename"}, path)


def _check_texts(node: Any, path: str) -> None:
    """Refuse texts that logging or OmegaConf would replace by something else, and factories."""
    if isinstance(node, str) and node not in STREAMS and re.match(r"\w+://", node):
        raise ConfigError(f"{path}: {node} is refused; streams are {', '.join(STREAMS)}")
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{path}: {node} is refused; only a log's filename may refer to other keys")
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key in (".", "()") and value not in FORMATTERS:
            raise ConfigError(f"{path}: logging would call what stands under {key!r}")
        _check_texts(value, f"{path}.{key}")
