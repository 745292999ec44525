"""The verbs: Hydra around the functions that a notebook calls, and errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detseg.config import CONFIG_MODULE, ConfigError, config_error, load_config, quoted, register_resolvers
from detseg.engine.errors import MENDABLE, WorkerFailed, exit_code, quiet, said
from detseg.engine.hydra_points import check_flags
from detseg.secrecy import keep_secrets, veil_arguments

DEBUG = "DETSEG_DEBUG"
"""Environment variable; set, an error shows where it arose."""


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Run one verb and turn errors that a user can mend into one line; return the exit code.

    Args:
        verb: one of ``detseg.cli.main.VERBS``.
        arguments: what followed it on the command line.
    """
    verbs: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train,
        "tune": _tune,
        "find": _find,
        "propose": _propose,
        "anchors": _anchors,
        "evaluate": _evaluate,
        "predict": _predict,
        "dashboard": _dashboard,
        "replay": _replay,
    }
    keep_secrets()
    arguments = veil_arguments(arguments)
    try:
        verbs[verb](arguments)
    except (HydraException, OmegaConfBaseException) as error:
        own = any(text.startswith(("-cd", "--config-dir")) for text in arguments)  # whose choices are not known here
        flags = any(text in ("-c", "--cfg", "-p", "--package", "-i", "--info") for text in arguments)  # with values
        typed = [text for text in arguments if not text.startswith("-") and ("=" in text or not flags)]
        return _fail(config_error(error, [] if own else typed, name=verb))
    except MENDABLE as error:
        return _fail(error)
    except SystemExit as end:  # from Hydra's own flags, or from a run that said its error already
        return end.code if isinstance(end.code, int) else 0
    return 0


def _train(arguments: Sequence[str]) -> None:
    from detseg.cli.sweeps import sweep_end
    from detseg.engine.resume import expand, flag_first, record

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors arrive here whole instead of being printed by Hydra
    register_resolvers()
    check_flags(arguments)
    arguments = flag_first(expand(quoted(arguments)))
    typed = sys.argv

    def run(cfg: DictConfig) -> float | None:
        """Train one trial; Hydra calls it."""
        sys.argv = [typed[0], "train", *arguments]  # what Lightning repeats where a run needs several processes
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweeps.add(Path(HydraConfig.get().sweep.dir))
            record(Path(HydraConfig.get().sweep.dir), arguments)
        try:
            return train_one(cfg)
        except MENDABLE as error:
            if not str(HydraConfig.get().sweeper["_target_"]).endswith(".BasicSweeper"):
                raise  # others want to know, and search on
            failures.append(error)  # Hydra would print the overrides once more
            return None

    failures: list[Exception] = []
    sweeps: set[Path] = set()  # the one that runs, if one does
    sys.argv = [typed[0], *arguments, *_trial_names(arguments)]  # hydra.main reads the command line itself
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="train")(run)()
    finally:
        sys.argv = typed
        for directory in sweeps:  # also where a trial failed: the error follows the table
            sweep_end(directory)
    if failures:
        raise failures[0]


def _trial_names(arguments: Sequence[str]) -> list[str]:
    """Return the override by which a sweep's directories are named after what varies alone."""
    if not {"-m", "--multirun"} & set(arguments):
        return []
    texts = [text for text in arguments if "=" in text and not text.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(texts)
    fixed = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"]


def train_one(cfg: DictConfig) -> float | None:
    """Train once and print what came out; a sweeper gets the figure that the task optimises."""
    from detseg.cli.show import show
    from detseg.engine.resume import settle_trial
    from detseg.engine.sweeps.sweep import run_trial
    from detseg.experiment import is_first_process, train

    hydra_cfg = HydraConfig.get()
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN:
            overrides, sweep = hydra_cfg.overrides.task, Path(hydra_cfg.sweep.dir)
            outcome = run_trial(
                cfg,
                train=lambda trial: settle_trial(trial) or train(trial),
                overrides=overrides,
                sweep=sweep,
                number=hydra_cfg.job.num,
            )
        else:
            outcome = train(cfg)
    except MENDABLE as error:
        if hydra_cfg.mode == RunMode.MULTIRUN:  # the sweeper goes on, and raises the first one at the end
            print(f"trial {hydra_cfg.job.num} failed: {said(error)}", file=sys.stderr, flush=True)
            raise
        raise SystemExit(_fail(error)) from error  # Hydra would print lines of its own
    if is_first_process():
        show(outcome)
    return outcome.figures.get(outcome.monitor)


def _tune(arguments: Sequence[str]) -> None:
    from detseg.cli.sweeps import tune

    if any(text in ("-h", "--help") for text in arguments):
        print(_verb_help("tune"))
        return
    tune(arguments)


def _find(arguments: Sequence[str]) -> None:
    from detseg.cli.find import find

    if any(text in ("-h", "--help") for text in arguments):
        print(_verb_help("find"))
        return
    quiet()
    find(quoted(arguments))


def _propose(arguments: Sequence[str]) -> None:
    from detseg.cli.propose import show_proposals
    from detseg.engine.propose import propose

    _compose_and_run(
        arguments, "propose", lambda *texts: load_config(*texts, name="propose"), propose, tell=show_proposals
    )


def _anchors(arguments: Sequence[str]) -> None:
    from detseg.cli.anchors import show_anchors
    from detseg.engine.anchors import anchors

    _compose_and_run(
        arguments, "anchors", lambda *texts: load_config(*texts, name="anchors"), anchors, tell=show_anchors
    )


def _evaluate(arguments: Sequence[str]) -> None:
    from detseg.evaluation import evaluate, load_evaluation

    _compose_and_run(arguments, "evaluate", load_evaluation, evaluate)


def _predict(arguments: Sequence[str]) -> None:
    from detseg.prediction import predict

    _compose_and_run(arguments, "predict", lambda *texts: load_config(*texts, name="predict"), predict)


def _replay(arguments: Sequence[str]) -> None:
    from detseg.engine.replay import main

    if not arguments:
        raise ConfigError("detseg replay needs a file, nonfinite_step_<n>.pt of a run; see detseg replay --help")
    if not main(arguments):
        raise SystemExit(1)


def _compose_and_run(
    arguments: Sequence[str],
    verb: str,
    load: Callable[..., DictConfig],
    run: Callable[[DictConfig], Any],
    *,
    tell: Callable[[Any], None] | None = None,
) -> None:
    """Compose without a run of Hydra's, as there is nothing to sweep; print what ``run`` returns by ``tell``."""
    from detseg.cli.show import show

    if any(text in ("-h", "--help") for text in arguments):
        print(_verb_help(verb))
        return
    flags = [text for text in arguments if text.startswith("-")]
    if flags:
        raise ConfigError(f"detseg {verb} takes key=value and --help, not {' '.join(flags)}")
    cfg = load(*arguments)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"detseg {verb} needs {', '.join(f'{key}=...' for key in missing)}; see detseg {verb} --help")
    quiet()
    (tell or show)(run(cfg))


def _dashboard(arguments: Sequence[str]) -> None:
    from detseg.engine.dashboard import dashboard

    dashboard(arguments)


def _verb_help(verb: str) -> str:
    """Return the commented file that the verb's keys come from."""
    from importlib.resources import files

    text = files(CONFIG_MODULE).joinpath(f"{verb}.yaml").read_text(encoding="utf-8")
    return f"usage: detseg {verb} [key=value ...]\n\n{text}"


def _fail(error: Exception) -> int:
    """Print an error in one line and return the exit code: 2 where what was asked for does not exist, else 1."""
    if os.environ.get(DEBUG):
        raise error
    print(f"detseg: {said(error)}", file=sys.stderr)
    code = exit_code(error)
    if code != 2:
        kind = error.kind if isinstance(error, WorkerFailed) else type(error).__name__
        print(f"({f'{kind}; ' if kind else ''}{DEBUG}=1 shows where it arose)", file=sys.stderr)
    return code
