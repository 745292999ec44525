"""Loggers that need a decision when they are built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger


def wandb_logger(
    *,
    save_dir: str | Path,
    project: str = "detseg",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    offline: bool | None = None,
    log_model: bool = False,
) -> WandbLogger:
    """Return a Weights & Biases logger that works without a login: the run then stays on disk.

    The run of the logger that this function returned before is closed: Lightning would go on with it, and all trials
    of a sweep would end up in one run.

    Args:
        save_dir: directory in which ``wandb/`` is made.
        project: project on the dashboard.
        name: the run's name there.
        group: runs of one group are shown together.
        tags: words to find the run by.
        offline: true or false decides; ``None`` is offline unless there is a login.
        log_model: send checkpoints too; left out where the run is offline, which wandb does not allow.
    """
    if offline is None:
        offline = not has_wandb_login()
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    _close_last()
    logger = WandbLogger(
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        save_dir=str(save_dir),
        offline=offline,
        mode="offline" if offline else None,  # Lightning sets a variable alone, which wandb.login has read already
        log_model=log_model and not offline,
    )
    _returned[:] = [logger]
    return logger


_returned: list[WandbLogger] = []
"""The logger returned last."""


def _close_last() -> None:
    """Close its run, unless it never began or was closed already."""
    import wandb

    if wandb.run is not None and any(logger._experiment is wandb.run for logger in _returned):
        wandb.finish()


def has_wandb_login() -> bool:
    """Return whether wandb knows an account and may use it; looks at its settings, never at the network."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
