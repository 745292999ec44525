"""What ``detseg train`` does, for notebooks too: a run with all its files."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from detseg.atomic import write_atomic
from detseg.config import ConfigError, Run, build, build_trainer
from detseg.secrecy import keep_secrets, veil

log = logging.getLogger(__name__)

FIGURES = "metrics.json"
"""In a run's directory: its figures, and the mark of a run that came to its end."""

ENVIRONMENT = "environment.json"


@dataclass
class Outcome:
    """What a verb leaves behind.

    Attributes:
        directory: the run's own directory.
        figures: every figure by name without stage; NaN is n/a.
        monitor: the figure that the task optimises, such as ``"map"``.
        class_names: by label.
        checkpoint: the one that was measured; ``None`` where the run kept none.
        files: written files worth looking at.
    """

    directory: Path
    figures: dict[str, float] = field(default_factory=dict)
    monitor: str = ""
    class_names: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    files: list[Path] = field(default_factory=list)


def train(cfg: DictConfig) -> Outcome:
    """Train as ``cfg`` says, then measure the best checkpoint on the validation split.

    A model with SVMs (R-CNN) fits them in between, see ``detseg.engine.stages``.

    The run directory receives ``resolved.yaml``, ``environment.json``, ``metrics.json`` and what callbacks and loggers
    write.

    Args:
        cfg: from ``load_config()``.

    Raises:
        ConfigError: the config does not fit, or its directory holds a run already.
        FileNotFoundError: ``resume`` or ``init_from`` names no file.
        CheckpointMismatch: the checkpoint of ``resume`` is of another model or of other classes.
        WorkerFailed: one of several processes failed; the message names its rank.
    """
    from detseg.engine.processes.launch import launch
    from detseg.engine.processes.plan import launches
    from detseg.engine.resume import attempt

    check_start(cfg)
    with attempt(cfg) if is_first_process() else nullcontext():
        return launch(cfg) if launches(cfg) else train_here(cfg)


def train_here(cfg: DictConfig) -> Outcome:
    """Train in this process, which may be one of several that do so together; see ``train``.

    What calls it has checked the start: workers find ``resolved.yaml`` in their directory, as they shall.
    """
    import torch

    from detseg.callbacks.loggers import closing
    from detseg.callbacks.signals import listening
    from detseg.engine.errors import quiet
    from detseg.engine.resume import held, requeued
    from detseg.engine.stages import fit_stages, log_fitted

    keep_secrets()
    quiet()
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    with listening(), held(Path(cfg.paths.output_dir)) if is_first_process() else nullcontext():
        run = build(requeued(cfg))
        with closing(run.trainer.loggers):
            begin(run)
            fit(run)
            fitted = fit_stages(run)
            outcome = finish(run)
            if fitted:
                log_fitted(run, outcome.figures)
            return outcome


def check_start(cfg: DictConfig) -> None:
    """Refuse what cannot become a run, before anything is built."""
    from detseg.engine.processes.plan import plan
    from detseg.engine.resume import goes_on, is_running

    directory = Path(cfg.paths.output_dir)
    if is_first_process() and is_running(directory):
        raise ConfigError(f"{directory}: another process trains there")
    traces = [directory / "resolved.yaml", *directory.glob("checkpoints/*.ckpt")]  # a task fitted by hand leaves those
    if is_first_process() and any(path.exists() for path in traces) and not goes_on(cfg):
        raise ConfigError(f"{directory} holds a run already, and nothing is overwritten; choose another name")
    for key in ("resume", "init_from"):
        if cfg[key] is not None and not Path(cfg[key]).is_file():
            raise FileNotFoundError(f"{key}={cfg[key]}: there is no such file (looked from {Path.cwd()})")
    if cfg.resume is not None and cfg.init_from is not None:
        raise ConfigError("resume goes on with all of a run, init_from takes weights alone; set one of them")
    if cfg.trainer.sync_batchnorm and cfg.trainer.accelerator == "cpu" and plan(cfg).world > 1:
        raise ConfigError("trainer.sync_batchnorm=true needs GPUs: PyTorch has none of it for processes on the CPU")


def begin(run: Run) -> None:
    """Check that a run can go on from where it is told to, and write what it is."""
    from detseg.checkpoint import check_resume
    from detseg.engine.resume import goes_on, say_differences
    from detseg.engine.stages import check_stages

    check_stages(run)
    if run.cfg.resume is not None:
        check_resume(run.task.model, run.cfg.resume, run.task.class_names)
    if is_first_process():
        directory = Path(run.cfg.paths.output_dir)
        if goes_on(run.cfg):
            log.info("going on from %s", run.cfg.resume)
            (directory / FIGURES).unlink(missing_ok=True)
        if run.cfg.resume is not None:
            say_differences(run.cfg, directory)
        write_run_files(run.cfg, directory)
        log.info(describe(run))
        log.info(rate_line(run.cfg))


def fit(run: Run) -> None:
    """Train."""
    from detseg.checkpoint import read_checkpoint
    from detseg.engine.explain import explained
    from detseg.engine.stages import stages_of

    resume = run.cfg.resume
    step = None if resume is None else read_checkpoint(resume).get("global_step")  # before another takes its name
    with explained(run):
        run.trainer.fit(run.task, datamodule=run.data, ckpt_path=resume, weights_only=True)
    if resume is not None and step == run.trainer.global_step and not stages_of(run.task.model):
        log.warning("resume=%s had come to its end: nothing was trained; raise trainer.max_epochs", resume)


def finish(run: Run) -> Outcome:
    """Measure the best checkpoint, write the figures and say what there is."""
    from detseg.callbacks.pruning import was_pruned

    directory = Path(run.cfg.paths.output_dir)
    best = best_checkpoint(run)
    if run.cfg.evaluate_after and best is not None and not was_pruned(run.trainer):
        measure(run, best)
    figures = run.task.results.get("val", {})
    if is_first_process():
        write_json(directory / FIGURES, figures)
    return Outcome(
        directory=directory,
        figures=figures,
        monitor=run.task.monitor.partition("/")[2],
        class_names=run.task.class_names,
        checkpoint=best,
        files=[path for path in (directory / "pictures", directory / FIGURES) if path.exists()],
    )


def is_first_process() -> bool:
    """Say whether this process is the one that writes and prints, of a run that may have several."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is not None:
        return int(getattr(lightning.rank_zero_only, "rank", 0)) == 0
    # As Lightning reads it when it is loaded, which takes seconds that a process which only starts others can spare.
    given = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return int(next((rank for rank in given if rank is not None), "0")) == 0


def describe(run: Run) -> str:
    """Return one line about a run: its model, its data, its directory."""
    count = sum(value.numel() for value in run.task.model.parameters())
    names = run.task.class_names
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{type(run.task.model).__name__} ({count / 1e6:.2f} million parameters) on {type(run.data).__name__} "
        f"({len(names)} classes: {shown}) in {run.cfg.paths.output_dir}"
    )


def rate_line(cfg: DictConfig) -> str:
    """Return one line about the learning rate and how it follows the images per step."""
    from detseg.config import instantiate
    from detseg.engine.rates import scaling

    return str(scaling(cfg, instantiate(cfg.optimizer, allow=list(cfg.allow), path="optimizer")))


def best_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint with the best figure so far, or ``None`` where none was kept."""
    path = getattr(run.trainer.checkpoint_callback, "best_model_path", "")
    return Path(path) if path else None


def measure(run: Run, checkpoint: Path) -> None:
    """Fill ``run.task.results["val"]`` with the figures of ``checkpoint``.

    A trainer without callbacks does it: those that average or draw belong to training.
    """
    from detseg.checkpoint import init_from, model_state, read_checkpoint
    from detseg.engine.explain import explained
    from detseg.engine.processes.sharding import is_sharded, load_whole

    if run.trainer.world_size > 1 and is_sharded(run.task.model):
        load_whole(run.task.model, model_state(read_checkpoint(checkpoint)))
    else:
        init_from(run.task.model, checkpoint)
    plain = OmegaConf.merge(run.cfg, {"callbacks": None, "logger": None})
    plain.trainer.enable_checkpointing, plain.trainer.enable_progress_bar = False, False
    trainer = build_trainer(cast(DictConfig, plain))
    with explained(run):
        trainer.validate(run.task, datamodule=run.data, verbose=False)


def write_run_files(cfg: DictConfig, directory: Path) -> None:
    """Write what a run was: ``resolved.yaml`` and ``environment.json`` (versions, platform, git commit, command)."""
    told = OmegaConf.create(veil(OmegaConf.to_container(cfg, resolve=True)))
    write_atomic(directory / "resolved.yaml", OmegaConf.to_yaml(told))  # other ranks may read it now
    write_json(directory / ENVIRONMENT, environment())


def environment() -> dict[str, Any]:
    """Return versions, platform, threads, git commit, command line and Slurm job of this process."""
    import torch

    from detseg.stamp import running_commit, versions

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": running_commit(),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def write_json(path: Path, content: Any) -> Path:
    """Write JSON without secrets, whole; NaN, which JSON does not know, becomes ``null``. Returns the path."""
    write_atomic(path, json.dumps(_without_nan(veil(content)), indent=1, allow_nan=False) + "\n")
    return path


def read_figures(directory: Path) -> dict[str, float] | None:
    """Return the figures of a run that came to its end, by name without stage; ``None`` for one that did not."""
    path = directory / FIGURES
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else float(value) for name, value in content.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
