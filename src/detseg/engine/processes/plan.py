"""How many processes a config asks for, and the file by which they are told what to do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from detseg.atomic import write_atomic
from detseg.config import ConfigError
from detseg.secrecy import veil

LATE = ("data.num_classes", "oc.env:")
"""What an interpolation refers to that is left to the workers: known only when the data are read, or not to be put
into a file."""

SPAWNED = ("_spawn", "_fork", "_notebook")
"""Ends of the names of strategies that start their processes themselves."""


@dataclass(frozen=True)
class Plan:
    """The processes of a run.

    Attributes:
        local: on each machine.
        nodes: machines.
        rendezvous: ``host:port`` where the machines meet; empty on one machine.
    """

    local: int
    nodes: int = 1
    rendezvous: str = ""

    @property
    def world(self) -> int:
        """All processes."""
        return self.local * self.nodes


def plan(cfg: DictConfig) -> Plan:
    """Return the processes that ``cfg`` asks for; without starting a device, as a fork may follow."""
    nodes = int(cfg.get("nodes") or cfg.trainer.num_nodes)
    return Plan(
        local=local_processes(cfg.trainer, cfg.get("slurm")), nodes=nodes, rendezvous=str(cfg.get("rdzv") or "")
    )


def local_processes(trainer: DictConfig, slurm: DictConfig | None = None) -> int:
    """Return how many processes one machine gets: one per device, as Lightning reads ``trainer.devices``.

    Args:
        trainer: the key.
        slurm: the key, where the machines are others than this one, whose GPUs then say nothing.

    Raises:
        ConfigError: all GPUs of a machine of Slurm's are wanted, and nothing says how many it has.
    """
    devices, accelerator = trainer.devices, str(trainer.accelerator)
    if isinstance(devices, list | tuple | ListConfig):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    text = str(devices).strip()
    if text not in ("auto", "-1"):
        return int(text)
    if accelerator not in ("auto", "gpu", "cuda"):
        return 1
    if slurm is not None and slurm.get("gpus_per_node") is not None:
        return max(1, int(slurm.gpus_per_node))
    if slurm is not None and accelerator != "auto" and not is_worker() and _gpus() == 0:
        raise ConfigError(
            f"trainer.devices={text}: all GPUs of a machine of Slurm's, of which this one knows nothing; say how many "
            "by trainer.devices or slurm.gpus_per_node"
        )
    return max(1, _gpus())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def is_worker() -> bool:
    """Say whether this process was started by ``torch.distributed.run`` or its like, as one of several."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launches(cfg: DictConfig) -> bool:
    """Say whether ``cfg`` needs processes beside this one, which is not itself one of them."""
    strategy = cfg.trainer.strategy
    own = isinstance(strategy, str) and strategy.endswith(SPAWNED)
    return not is_worker() and not own and (plan(cfg).world > 1 or cfg.get("slurm") is not None)


def write_config(cfg: DictConfig, path: Path, wanted: Plan) -> None:
    """Write what the workers read: all that is drawn, timed or composed is settled, so all of them read the same.

    Args:
        cfg: as composed.
        path: written whole, as a worker may read at any time.
        wanted: the processes, whose numbers are written in place of ``auto`` and ``-1``.
    """
    settled = cast(DictConfig, OmegaConf.create(veil(settle(cfg))))
    if not isinstance(settled.trainer.devices, ListConfig) and "," not in str(settled.trainer.devices):
        settled.trainer.devices = wanted.local  # a list of GPUs stays, as it says which
    settled.trainer.num_nodes = wanted.nodes
    write_atomic(path, OmegaConf.to_yaml(settled))


def settle(node: Any) -> Any:
    """Return ``node`` as plain containers with interpolations resolved, but for those that are ``LATE``."""
    if isinstance(node, DictConfig):
        return {key: _settle_item(node, key) for key in node}
    if isinstance(node, ListConfig):
        return [_settle_item(node, index) for index in range(len(node))]
    return node


def _settle_item(parent: Any, key: Any) -> Any:
    if OmegaConf.is_missing(parent, key):
        return "???"
    if OmegaConf.is_interpolation(parent, key):
        raw = str(parent._get_node(key)._value())
        if any(late in raw for late in LATE):
            return raw
    return settle(parent[key])
