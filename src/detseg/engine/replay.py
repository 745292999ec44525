"""``detseg replay``: do again a step whose loss or gradient was not finite, and say where that began."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detseg.allow import build_plain, rules_for
from detseg.callbacks.replay_file import REPLAY_FORMAT
from detseg.checkpoint import model_state, read_stamp, without_downloads
from detseg.config import ConfigError
from detseg.engine.half import HalfWeights
from detseg.nn.weights import load_weights, read_plain
from detseg.stamp import STAMP_KEY
from detseg.structures import Batch
from detseg.structures.plain import from_plain
from detseg.tasks.proposals import given_proposals

USAGE = """usage: detseg replay <nonfinite_step_N.pt or its run's directory> [device=cpu] [allow=[mypackage]]

Do again the step whose loss or gradient was not finite, in one process: prints its losses, the first layer whose output
is not finite, and the gradients that are not. Exit code 0 where that is reproduced, 1 where all is finite.

  device  cpu | cuda (default: as the run, where there is one); the same kind gives the same numbers
  allow   further packages that the file may build from; name only what you trust"""

PRECISIONS = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
"""What the names of precisions mean to autocast; all else runs in the weights' own type."""


@dataclass
class Found:
    """What a replay saw.

    Attributes:
        step: number of the optimiser step, from 0.
        images: by batch, files or ids.
        recorded: what the run said when it wrote the file.
        terms: the loss terms of each batch.
        layer: name and class of the first layer with an output that is not finite, with what it was given; empty where
            all are finite.
        gradients: names of the parameters whose gradient is not finite, in the order of the backward pass.
        operation: of autograd, the first whose gradient is NaN though all before it was finite; empty where there is
            none.
        reproduced: whether a loss or gradient was not finite again.
    """

    step: int
    recorded: str
    images: list[str] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    layer: str = ""
    gradients: list[str] = field(default_factory=list)
    operation: str = ""
    reproduced: bool = False


def replay(path: str | Path, *, device: str | None = None, allow: Sequence[str] = ()) -> Found:
    """Rebuild the model of a replay file and do its step again, up to the gradients.

    Args:
        path: written by ``detseg.callbacks.Guard``, or the directory of its run: the newest one in it.
        device: default: the kind that the run was on, where there is one, else the CPU. The same kind gives the same
            numbers; on another they may differ in the last digits.
        allow: further packages that the file may build from; name only what you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no replay file, is damaged, or lacks the model's config.
    """
    path = _file(Path(path))
    content = _read(path)
    setting = _setting(content, torch.device(device or _device(str(content["device"]))))
    model = _build(content, path, allow).to(setting.place).to(memory_format=setting.layout)
    cause = content["cause"]
    found = Found(step=int(content["global_step"]), recorded=f"loss {cause['losses']}, gradient norm {cause['norm']}")
    for window in content["windows"]:
        model.zero_grad(set_to_none=True)
        with _watched(model, found):
            for entry in window["batches"]:
                images, terms = _step(model, entry, setting)
                found.images.append(images)
                found.terms.append(terms)
        if _bad_gradients(model, found) and not found.layer:
            found.operation = _operation(model, window, setting)
    found.reproduced = bool(found.gradients) or any(not _finite(terms) for terms in found.terms)
    return found


def main(arguments: Sequence[str]) -> bool:
    """Run ``detseg replay``: print what is found; return whether something was not finite again.

    Args:
        arguments: what followed the verb.

    Raises:
        ConfigError: they are not a file and the two keys.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return bool(arguments)
    path, *rest = arguments
    given = dict(text.partition("=")[::2] for text in rest)
    if path.startswith("-") or set(given) - {"device", "allow"}:
        raise ConfigError(f"detseg replay takes a file, device=... and allow=..., not {' '.join(arguments)}")
    allow = [name.strip() for name in given.get("allow", "").strip("[]").split(",") if name.strip()]
    found = replay(path, device=given.get("device"), allow=allow)
    print(describe(found))
    return found.reproduced


def describe(found: Found) -> str:
    """Return what a replay saw, for people."""
    lines = [f"step {found.step}; when it was written: {found.recorded}"]
    for images, terms in zip(found.images, found.terms, strict=True):
        values = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
        lines.append(f"images {images}\n  loss {sum(terms.values()):.6g} ({values})")
    if found.layer:
        lines.append(f"first output that is not finite: {found.layer}")
    elif found.reproduced:
        lines.append("the outputs of all layers are finite: it arises in the loss, or on the way back")
    if found.operation:
        lines.append(f"first operation with a gradient of NaN: {found.operation}")
    if found.gradients:
        lines.append(f"{len(found.gradients)} gradients are not finite, first {', '.join(found.gradients[:5])}")
    lines.append("reproduced" if found.reproduced else "not reproduced: all is finite here; try the run's own device")
    return "\n".join(lines)


@dataclass
class _Setting:
    """How the run computed: where, in which layout and number type, and over how many batches a step went."""

    place: torch.device
    layout: torch.memory_format
    autocast: torch.dtype | None
    accumulate: int


def _setting(content: Mapping[str, Any], place: torch.device) -> _Setting:
    task = (content[STAMP_KEY].get("config") or {}).get("task") or {}
    return _Setting(
        place=place,
        layout=torch.channels_last if task.get("channels_last") else torch.contiguous_format,
        autocast=PRECISIONS.get(str(content["precision"])),
        accumulate=int(content["accumulate"]),
    )


def _file(path: Path) -> Path:
    """Return a directory's newest replay file; a file as it is."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("nonfinite_step_*.pt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{path} holds no nonfinite_step_<n>.pt; the guard writes it into the run's directory")
    return found[-1]


def _read(path: str | Path) -> dict[str, Any]:
    content = read_plain(path, "replay file")
    if not isinstance(content, dict) or "replay" not in content:
        raise ValueError(f"{path} is no replay file; the guard writes nonfinite_step_<n>.pt into the run's directory")
    if content["replay"] != REPLAY_FORMAT:
        raise ValueError(f"{path} is a replay file of format {content['replay']}, this detseg reads {REPLAY_FORMAT}")
    read_stamp(path, content)
    return content


def _device(kind: str) -> str:
    return "cuda" if kind == "cuda" and torch.cuda.is_available() else "cpu"


def _build(content: Mapping[str, Any], path: str | Path, allow: Sequence[str]) -> nn.Module:
    """Return the model with its weights before the step, each part training or not as it was."""
    node = content[STAMP_KEY].get("model")
    if not node:
        raise ValueError(f"{path}: the run's model was built by hand, so nothing says how; train it from a config")
    model = cast(nn.Module, build_plain(without_downloads(node), rules_for(allow)))
    if content["precision"] == "bf16-true":
        model = HalfWeights(device="cpu").convert_module(model)  # of which the products' place is not used here
    elif content["precision"] == "64-true":
        model = model.double()
    load_weights(model, model_state(content), source=f"replay file {path}")
    model.train()
    for name in content["evaluating"]:
        model.get_submodule(name).training = False
    for name in content["frozen"]:
        model.get_parameter(name).requires_grad_(False)
    return model


def _step(model: nn.Module, entry: Mapping[str, Any], setting: _Setting) -> tuple[str, dict[str, float]]:
    """Do one batch forward and back; return its images' names and its loss terms."""
    batch: Batch = from_plain(entry["batch"]).to(setting.place)
    images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images  # (B, 3, H, W)
    if setting.autocast is None:
        images = images.to(next(model.parameters()).dtype)
    images = images.contiguous(memory_format=setting.layout)
    torch.set_rng_state(entry["cpu"])
    if entry["cuda"] is not None and setting.place.type == "cuda":
        torch.cuda.set_rng_state(entry["cuda"], setting.place)
    with torch.autocast(setting.place.type, dtype=setting.autocast, enabled=setting.autocast is not None):
        outputs = model(images, batch.sizes, batch.targets, **given_proposals(batch))
        terms: dict[str, Tensor] = cast(Any, model).loss(outputs, batch.targets)
        loss = torch.stack(list(terms.values())).sum()
    if loss.requires_grad:
        (loss / setting.accumulate).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    return _names(batch), {name: float(term.detach()) for name, term in terms.items()}


def _names(batch: Batch) -> str:
    return ", ".join(target.file or str(target.image_id) for target in batch.targets)


@contextlib.contextmanager
def _watched(model: nn.Module, found: Found) -> Iterator[None]:
    """Note the first layer whose output is not finite, and the gradients that are not, in the order they come."""

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found.layer or all(_is_finite(tensor) for tensor in _tensors(output)):
            return
        given = all(_is_finite(tensor) for tensor in _tensors(list(inputs)))
        weights = [key for key, value in module.named_parameters(recurse=False) if not _is_finite(value)]
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(list(inputs)))
        kind = f"{'finite' if given else 'non-finite'} input {shapes}"
        found.layer = f"{name or 'the model'} ({type(module).__name__}), from {kind}"
        found.layer += f"; its {', '.join(weights)} hold NaN or infinity" if weights else ""

    def note(name: str, gradient: Tensor) -> None:
        if name not in found.gradients and not _is_finite(gradient):
            found.gradients.append(name)

    handles = [
        module.register_forward_hook(lambda own, inputs, output, name=name: look(name, own, inputs, output))
        for name, module in model.named_modules()
    ]
    handles += [
        cast(Any, weight).register_hook(lambda gradient, name=name: note(name, gradient))  # torch gives it no types
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bad_gradients(model: nn.Module, found: Found) -> bool:
    """Add gradients whose sum over the batches overflowed, and say whether there is any at all."""
    for name, weight in model.named_parameters():
        if name not in found.gradients and weight.grad is not None and not _is_finite(weight.grad):
            found.gradients.append(name)
    return bool(found.gradients)


def _operation(model: nn.Module, window: Mapping[str, Any], setting: _Setting) -> str:
    """Return the operation in which autograd first meets NaN, such as ``SqrtBackward0``; slow, so done last."""
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is slow, and prints the forward call's stack
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                for entry in window["batches"]:
                    _step(model, entry, setting)
        except RuntimeError as error:
            match = re.search(r"Function '(\w+)'", str(error))
            return match[1] if match else ""
    return ""


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of floating numbers in containers and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _finite(terms: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in terms.values())
