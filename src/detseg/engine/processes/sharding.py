"""``trainer=fsdp``: weights, gradients and optimiser state spread over processes, by torch's ``fully_shard`` (FSDP2).

Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stage 3: every process holds a share of each weight and collects the
rest of a part right before that part computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from detseg.durable import check_seal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LEAST = 100_000
"""Parameters below which a block of the backbone is not worth a collection of its own."""


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` as plain sharded data parallelism; on the CPU too, over gloo.

    A checkpoint is one file with whole weights, as of every other run: ``detseg.load`` reads it, and so does a run on
    another number of processes. The first process needs memory for it.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let every process have other images; Lightning's own default divides the layers of one machine instead."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model, then let the task make its optimiser over the shares.

        Lightning's own waits for a task that overrides ``configure_model``, which no other strategy wants.

        Raises:
            ValueError: a callback averages weights, which it could not do over shares.
        """
        assert self.accelerator is not None and self.lightning_module is not None and self.model is not None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's Trainer has them
            if isinstance(callback, WeightAveraging):
                raise ValueError(
                    f"trainer=fsdp cannot average weights ({type(callback).__name__}): each process has shares alone; "
                    "remove it, or choose trainer=ddp"
                )
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.model = self.precision_plugin.convert_module(self.model)  # before, as it may replace what is sharded
        shard(cast(nn.Module, self.lightning_module.model), self.device_mesh["data_parallel"])
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint after comparing it with its seal."""
        check_seal(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only=True)

    def on_validation_start(self) -> None:
        """Collect the whole weights on every process until validation ends.

        How many images a process has, and how often a part is called for them, depends on the data; processes that
        collected part by part would wait for one another for ever.
        """
        self._collect(True)

    def on_validation_end(self) -> None:
        """Let every process have its share alone."""
        self._collect(False)

    def on_test_start(self) -> None:
        """As for validation."""
        self._collect(True)

    def on_test_end(self) -> None:
        """As for validation."""
        self._collect(False)

    def _collect(self, whole: bool) -> None:
        assert self.lightning_module is not None
        model = cast(nn.Module, self.lightning_module.model)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(not whole and part is not model, recurse=False)
                if whole:
                    part.unshard()
                else:
                    part.reshard()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model in place: the large blocks of its backbone, each of its own parts, and what is left.

    Parts are collected when they are called, so what is sharded by itself must be called as a module: the entries of a
    ``Sequential`` are, and so are a detector's parts. A model that is sharded already stays as it is.

    Args:
        model: on the device of the mesh.
        mesh: the processes, of one dimension.
    """
    if is_sharded(model):
        return
    backbone = getattr(model, "backbone", None)
    rows = [] if not isinstance(backbone, nn.Module) else backbone.modules()
    blocks = [block for row in rows if isinstance(row, nn.Sequential) for block in row if _size(block) >= LEAST]
    parts = [part for part in model.children() if _size(part) and not isinstance(part, nn.ModuleList | nn.ModuleDict)]
    for part in [*reversed(blocks), *parts]:  # inner ones first
        if not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _size(part: nn.Module) -> int:
    return sum(value.numel() for value in part.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Say whether ``shard`` was here."""
    return isinstance(model, FSDPModule)


def load_whole(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Copy a whole state dict, which every process has read, into a sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
