"""How the learning rate follows the number of images per optimiser step.

Linear for SGD: Goyal et al. 2017, "Accurate, Large Minibatch SGD" (arXiv:1706.02677, section 2.1). Square root for the
Adam family: Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (arXiv:2205.10287).
Both want a warm-up, which the schedules have. Not scaled here: Adam's betas and epsilon, as Malladi et al. would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch.optim import Optimizer

from detseg.engine.processes.plan import plan
from detseg.tasks.groups import peak_rate

LINEAR = ("SGD", "ASGD")
"""Optimisers whose step is as long as the gradient."""

SQRT = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adafactor")
"""Optimisers that divide by the gradient's own size."""

RULES = ("auto", "linear", "sqrt", "none")


@dataclass(frozen=True)
class Scaling:
    """What the rule makes of a config.

    Attributes:
        rule: ``"linear"``, ``"sqrt"`` or ``"none"``.
        optimizer: name of its class.
        base: images per step that ``rate`` is for.
        images: images per step that there are: of all processes and all accumulated batches.
        rate: as the config says.
    """

    rule: str
    optimizer: str
    base: int
    images: int
    rate: float

    @property
    def factor(self) -> float:
        """By what the rate is multiplied."""
        ratio = self.images / self.base
        return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.rule]

    def __str__(self) -> str:
        named = {"linear": "in proportion", "sqrt": "by the square root", "none": "not at all"}[self.rule]
        rule = f"{self.optimizer}'s follows them {named} (lr_rule={self.rule})"
        if self.images == self.base:
            return f"learning rate {self.rate:.4g} for {self.images} images a step; with more, {rule}"
        return (
            f"learning rate {self.rate * self.factor:.4g}: {self.rate:.4g} is for {self.base} images a step, there are "
            f"{self.images}, and {rule}"
        )


def scaling(cfg: DictConfig, optimizer: Callable[..., Optimizer]) -> Scaling:
    """Return how the learning rate of ``cfg`` is scaled.

    Args:
        cfg: resolved.
        optimizer: waits for its parameters.

    Raises:
        ValueError: ``lr_rule`` is no rule, or ``lr_batch`` not above 0.
    """
    rule, kind = str(cfg.get("lr_rule", "auto")), optimizer.func if isinstance(optimizer, partial) else optimizer
    name = str(getattr(kind, "__name__", kind))
    if rule not in RULES:
        raise ValueError(f"lr_rule={rule} is unknown; choose one of {', '.join(RULES)}")
    if rule == "auto":
        rule = "linear" if name in LINEAR else "sqrt" if name in SQRT else "none"
    alone = int(cfg.data.get("batch_size", 1)) * int(cfg.trainer.accumulate_grad_batches)
    base = cfg.get("lr_batch")
    if base is not None and base < 1:
        raise ValueError(f"lr_batch={base}: the learning rate must be for at least 1 image per step")
    images = alone * plan(cfg).world
    return Scaling(rule, name, alone if base is None else int(base), images, peak_rate(optimizer))


def scaled(optimizer: Any, how: Scaling) -> Any:
    """Return ``optimizer``, which waits for its parameters, with the learning rate that the rule gives."""
    return optimizer if how.factor == 1.0 else partial(optimizer, lr=how.rate * how.factor)
