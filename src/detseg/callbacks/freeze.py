"""Freeze parts of the model for the first epochs, then let them learn; or from some epoch on.

The usual start of a fine-tuning: the new head learns first, so that its large gradients do not undo a pretrained body
(Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3). Lightning's
``BackboneFinetuning`` adds the thawed parameters to the optimiser as new groups; here they are in it from the start,
so that the schedule and a checkpoint know them.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from detseg.tasks.groups import body_prefix

NORMS_WITH_MEMORY = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Norms that keep running statistics; in eval mode they use them and leave them as they are."""


class Freeze(L.Callback):
    """Hold the weights of some parts still until an epoch; their batch norm uses, and keeps, its statistics.

    What is frozen depends on the epoch alone, so a resumed run goes on exactly, also across the thaw. In one process
    the frozen parameters need no gradient, which saves their backward pass. Several processes have agreed on the
    gradients that they exchange before the first step; there the frozen parameters' are dropped before the clipping,
    so that neither the norm nor momentum nor weight decay sees them.

    Args:
        parts: what the names of the frozen parameters begin with, such as ``["backbone.body.layer1"]``; ``None``: the
            backbone's body.
        until_epoch: the first epoch, counted from 0, in which they learn; ``None``: held to the end.
        from_epoch: the first epoch, counted from 0, in which they are held; later than 0 where they shall learn first.

    Raises:
        ValueError: an epoch is below 0, or nothing lies between the two; or from the start of training: a part has no
            trained parameter, or nothing would be left to train.
    """

    def __init__(self, *, parts: Sequence[str] | None = None, until_epoch: int | None = 1, from_epoch: int = 0) -> None:
        if until_epoch is not None and until_epoch < 0:
            raise ValueError(f"Freeze: until_epoch is {until_epoch}; it is an epoch, counted from 0")
        if from_epoch < 0 or (until_epoch is not None and from_epoch > until_epoch):
            raise ValueError(
                f"Freeze: from_epoch is {from_epoch} and until_epoch {until_epoch}; give an epoch, counted from 0, "
                "that is not after until_epoch"
            )
        self.parts, self.until_epoch = None if parts is None else list(parts), until_epoch
        self.from_epoch = from_epoch
        self.frozen: list[Parameter] = []
        """The parameters held still at the moment."""
        self._norms: list[nn.Module] = []
        self._without_gradient: list[Parameter] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze or thaw as the epoch asks for, which in a resumed run may be a later one."""
        self._follow(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze or thaw as the epoch asks for."""
        self._follow(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients that were worked out all the same."""
        for parameter in self.frozen:
            parameter.grad = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing frozen behind."""
        self._thaw()

    def _follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        wanted = epoch >= self.from_epoch and (self.until_epoch is None or epoch < self.until_epoch)
        if wanted and not self.frozen:
            self._freeze(pl_module.model, alone=trainer.world_size == 1)  # type: ignore[arg-type]  # our tasks' model
        elif not wanted:
            self._thaw()

    def _freeze(self, model: nn.Module, *, alone: bool) -> None:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        prefixes = self._prefixes(trained)
        held = {name: value for name, value in trained.items() if _below(name, prefixes)}
        if len(held) == len(trained):
            raise ValueError(
                f"callbacks.freeze.parts {prefixes} hold all {len(trained)} parameters: nothing is trained"
            )
        self.frozen = list(held.values())
        self._norms = [
            module
            for name, module in model.named_modules()
            if isinstance(module, NORMS_WITH_MEMORY) and module.training and _below(f"{name}.", prefixes)
        ]
        for norm in self._norms:
            norm.eval()
        if alone:
            self._without_gradient = self.frozen
            for parameter in self.frozen:
                parameter.requires_grad_(False)

    def _prefixes(self, trained: dict[str, Parameter]) -> list[str]:
        prefixes = [body_prefix(trained)] if self.parts is None else self.parts
        for prefix in prefixes:
            if not any(_below(name, [prefix]) for name in trained):
                tops = sorted({name.partition(".")[0] for name in trained})
                raise ValueError(
                    f"callbacks.freeze: no trained parameter lies below {prefix!r}; the model's parts are "
                    f"{', '.join(tops)}"
                )
        return prefixes

    def _thaw(self) -> None:
        for norm in self._norms:
            norm.train()
        for parameter in self._without_gradient:
            parameter.requires_grad_(True)
        self.frozen, self._norms, self._without_gradient = [], [], []


def _below(name: str, prefixes: Sequence[str]) -> bool:
    """Say whether a dotted name lies below one of ``prefixes``; ``layer1`` holds ``layer1.0`` but not ``layer10``."""
    return any(name.startswith(f"{prefix.rstrip('.')}.") or name == prefix for prefix in prefixes)
