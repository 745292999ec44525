"""Parameter groups: which weights learn at which rate, and which of them decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer


def peak_rate(optimizer: Callable[..., Optimizer]) -> float:
    """Return the learning rate of an optimiser that waits for its parameters; 1e-3, Adam's own, where it names none."""
    keywords = optimizer.keywords if isinstance(optimizer, partial) else {}
    return float(keywords.get("lr", 1e-3))


def parameter_groups(
    model: nn.Module, *, rate: float, backbone_lr_scale: float = 1.0, decay_one_dimensional: bool = False
) -> list[dict[str, Any]]:
    """Return up to four groups: body of the backbone or not, with weight decay or without.

    Args:
        model: its trained parameters are divided.
        rate: learning rate of what is not the backbone's body.
        backbone_lr_scale: learning rate of the backbone's body relative to ``rate``.
        decay_one_dimensional: weight decay on norms and biases too.

    Raises:
        ValueError: ``backbone_lr_scale`` is set, but the model has no parameter under ``backbone``.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    prefix = "backbone.body." if any(name.startswith("backbone.body.") for name, _ in named) else "backbone."
    groups: dict[str, dict[str, Any]] = {}
    for name, value in named:
        body = backbone_lr_scale != 1.0 and name.startswith(prefix)
        plain = value.ndim <= 1 and not decay_one_dimensional
        key = ("body" if body else "rest") + ("_no_decay" if plain else "")
        group = groups.setdefault(key, {"name": key, "params": []})
        group["params"].append(value)
        group["lr"] = rate * (backbone_lr_scale if body else 1.0)
        if plain:
            group["weight_decay"] = 0.0
    if backbone_lr_scale != 1.0 and not any(key.startswith("body") for key in groups):
        raise ValueError(
            f"task.backbone_lr_scale is {backbone_lr_scale}, but no trained parameter's name begins with "
            f"'backbone.' ({len(named)} parameters); set it to 1.0 for this model"
        )
    return [groups[key] for key in sorted(groups)]
