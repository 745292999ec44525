"""Parameter groups: which weights learn at which rate, and which of them decay.

Every trained parameter is in a group from the start, also one that a callback freezes for the first epochs: a group
added later would have no place in the schedule nor in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

CHOSEN = {"initial_lr": "learning rate", "weight_decay": "weight decay"}
"""What the config decides when a run goes on, by the name that torch gives it in a group."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def peak_rate(optimizer: Callable[..., Optimizer]) -> float:
    """Return the learning rate of an optimiser that waits for its parameters; 1e-3, Adam's own, where it names none."""
    keywords = optimizer.keywords if isinstance(optimizer, partial) else {}
    return float(keywords.get("lr", 1e-3))


def chosen_rates(optimizer: Optimizer) -> list[dict[str, float]]:
    """Return what the config says about every group, to be compared with what a checkpoint says; see ``choose_rates``.

    Writes the peak rate down where the schedule does not, as checkpoints keep the groups.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return [{key: float(group[key]) for key in CHOSEN if key in group} for group in optimizer.param_groups]


def choose_rates(optimizer: Optimizer, schedules: Iterable[Any], chosen: Sequence[Mapping[str, float]]) -> list[str]:
    """Let the config decide peak rates and weight decay of an optimiser whose state is a checkpoint's.

    Torch restores the groups whole, and so the rates of the run before, whatever the config says now. Where both agree
    nothing is touched.

    Args:
        optimizer: after its state is loaded.
        schedules: which hold the peak rates too.
        chosen: from ``chosen_rates``, before the state was loaded.

    Returns:
        What changed, such as ``"learning rate 0.0005, it was 0.002"``.
    """
    changed: list[str] = []
    for group, wanted in zip(optimizer.param_groups, chosen, strict=True):
        for key, new in wanted.items():
            old = group.get(key, new)
            if old == new:
                continue
            group[key] = new
            if key == "initial_lr":
                group["lr"] = group["lr"] * new / old if old else new
            changed.append(f"{CHOSEN[key]} {new:.4g}, it was {old:.4g}")
    for schedule in schedules if changed else ():
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    return list(dict.fromkeys(changed))


def body_prefix(names: Iterable[str]) -> str:
    """Return what the parameters of the backbone's body begin with, of a model with these parameter names.

    A pyramid's body is ``backbone.body.``, a plain backbone's ``backbone.``, whether there is one or not.
    """
    return "backbone.body." if any(name.startswith("backbone.body.") for name in names) else "backbone."


def layers_of_body(model: nn.Module) -> dict[str, int]:
    """Return the number of the layer, from 0 at the image, for every parameter of the backbone's body.

    A layer is a block of a stage that lists its blocks (a residual block of a ResNet), else the stage itself; what is
    registered between blocks without parts of its own, such as a stem's convolution and norm, is one layer together.

    Args:
        model: parameters are named as in ``model.named_parameters()``.
    """
    prefix = body_prefix(name for name, _ in model.named_parameters())
    if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
        return {}
    body, layers = model.get_submodule(prefix.rstrip(".")), list[list[str]]()
    inner = [(name, child) for name, child in body.named_children() if _holds(child)]
    if len(inner) == 1 and not list(body.parameters(recurse=False)):  # timm's networks, wrapped once more
        prefix, body = f"{prefix}{inner[0][0]}.", inner[0][1]
    _collect(body, prefix, layers)
    return {name: number for number, names in enumerate(filter(None, layers)) for name in names}


def _collect(module: nn.Module, prefix: str, layers: list[list[str]]) -> None:
    """Append one list of parameter names per layer below ``module``, in the order of registration."""
    loose = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    layers.append(loose)
    for name, child in module.named_children():
        names = [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
        if not _nested(child):
            loose.extend(names)  # a convolution or a norm between two blocks
            continue
        if isinstance(child, CONTAINERS) and any(_nested(part) for part in child.children()):
            _collect(child, f"{prefix}{name}.", layers)
        else:
            layers.append(names)
        loose = []
        layers.append(loose)


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _nested(module: nn.Module) -> bool:
    return any(_holds(part) for part in module.children())


def parameter_groups(
    model: nn.Module,
    *,
    rate: float,
    backbone_lr_scale: float = 1.0,
    decay_one_dimensional: bool = False,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the groups: the body of the backbone or not, with weight decay or without, and the body layer by layer.

    Layer-wise rates as in ULMFiT (Howard and Ruder 2018, section 3.2, there with 1 / 2.6) and BEiT (Bao et al. 2021):
    layer i of n learns at ``rate * backbone_lr_scale * layer_decay ** (n - i)``, so the last one is one factor below
    the rest of the model.

    Args:
        model: its trained parameters are divided.
        rate: learning rate of what is not the backbone's body.
        backbone_lr_scale: learning rate of the backbone's body relative to ``rate``.
        decay_one_dimensional: weight decay on norms and biases too.
        layer_decay: factor in (0, 1] from each layer of the body to the one before it; 1 keeps the body together.

    Raises:
        ValueError: ``layer_decay`` is out of range; or it or ``backbone_lr_scale`` is set, but the model has no
            trained parameter under ``backbone``.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"task.layer_decay is {layer_decay}; it is a factor in (0, 1], 0.75 for pretrained bodies")
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    scales = _body_scales(model, named, backbone_lr_scale, layer_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in named.items():
        place, scale = scales.get(name, ("rest", 1.0))
        plain = value.ndim <= 1 and not decay_one_dimensional
        key = place + ("_no_decay" if plain else "")
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate * scale})
        group["params"].append(value)
        if plain:
            group["weight_decay"] = 0.0
    return [groups[key] for key in sorted(groups)]


def _body_scales(
    model: nn.Module, named: Mapping[str, Parameter], backbone_lr_scale: float, layer_decay: float
) -> dict[str, tuple[str, float]]:
    """Return (name of the group, factor of the rate) for the parameters of the body, where they have their own."""
    if backbone_lr_scale == 1.0 and layer_decay == 1.0:
        return {}
    layers = {name: number for name, number in layers_of_body(model).items() if name in named}
    if not layers:
        key, value = ("layer_decay", layer_decay) if layer_decay != 1.0 else ("backbone_lr_scale", backbone_lr_scale)
        raise ValueError(
            f"task.{key} is {value}, but no trained parameter's name begins with 'backbone.' ({len(named)} "
            "parameters); set it to 1.0 for this model"
        )
    if layer_decay == 1.0:
        return dict.fromkeys(layers, ("body", backbone_lr_scale))
    count = max(layers_of_body(model).values()) + 1
    return {
        name: (f"body_{number:02d}", backbone_lr_scale * layer_decay ** (count - number))
        for name, number in layers.items()
    }
