"""Reading checkpoints: ``load`` rebuilds a model from the stamp, ``init_from`` takes the weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detseg.allow import MODEL_RULES, build_plain, rules_for
from detseg.nn.weights import CheckpointMismatch, load_weights, read_plain
from detseg.predictor import Predictor
from detseg.stamp import STAMP_FORMAT, STAMP_KEY

PREFIX = "model."
"""What Lightning puts before the model's keys, since the task holds it as ``self.model``."""


def load(path: str | Path, *, device: torch.device | str = "cpu", allow: Sequence[str] = ()) -> Predictor:
    """Rebuild the model of a checkpoint, ready to be called: ``load(path)("photo.jpg")[0]``.

    Nothing is downloaded: the weights that the backbone started from are not asked for again.

    Args:
        path: a checkpoint that ``detseg train`` wrote.
        device: where the model goes.
        allow: further packages that the checkpoint may build from, such as ``["mypackage"]``. Name only what you
            trust: their classes and functions are called with the file's arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no detseg checkpoint, holds more than plain values and tensors, or its stamp lacks the config.
        RefusedTarget: it names something outside the allowed packages.
        CheckpointMismatch: its weights do not fit the model that it describes.
    """
    checkpoint = read_checkpoint(path)
    stamp = read_stamp(path, checkpoint)
    rules = rules_for(allow, MODEL_RULES)
    model = build_plain(without_downloads(_part(stamp, "model", path)), rules)
    load_weights(model, model_state(checkpoint), source=f"checkpoint {path}")
    transform = stamp.get("eval_transform")
    return Predictor(
        model=model,
        class_names=_part(stamp, "class_names", path),
        category_ids=_part(stamp, "category_ids", path),
        transform=None if transform is None else build_plain(transform, rules),
        size_divisor=stamp.get("size_divisor") or 32,
    ).to(device)


def init_from(model: nn.Module, path: str | Path, *, drop_head: bool = False) -> list[str]:
    """Copy the weights of a checkpoint, or of a plain state dict, into ``model``.

    Args:
        model: what to fill; its own construction stays as it is.
        path: a checkpoint of any Lightning run that keeps its net as ``model``, or a file with a state dict.
        drop_head: let the parts outside the backbone differ, as for other classes; what differs starts anew.

    Returns:
        The keys that were left out.

    Raises:
        CheckpointMismatch: keys, shapes or class counts differ; with ``drop_head`` in the backbone.
    """
    checkpoint = read_checkpoint(path)
    stamp = checkpoint.get(STAMP_KEY)
    if not drop_head and isinstance(stamp, Mapping):
        _check_classes(model, stamp, path)
    return load_weights(model, model_state(checkpoint), drop_head=drop_head, source=f"checkpoint {path}")


def check_resume(model: nn.Module, path: str | Path, class_names: Sequence[str]) -> None:
    """Raise unless training can go on from a checkpoint: the same model, and the same classes in the same order.

    Args:
        model: what will go on; its weights become the checkpoint's.
        path: a checkpoint that ``detseg train`` wrote.
        class_names: of the data, by label.

    Raises:
        CheckpointMismatch: the model or the classes differ; the message shows both sides.
    """
    checkpoint = read_checkpoint(path)
    remedy = "To start from other weights set init_from (with drop_head=true for other classes) instead of resume"
    names = (checkpoint.get(STAMP_KEY) or {}).get("class_names")
    if names is not None and list(names) != list(class_names):
        told = f"It was trained for {', '.join(names)}, the data have {', '.join(class_names)}. {remedy}"
        raise CheckpointMismatch(source=f"resume={path}", remedy=told)
    try:
        load_weights(model, model_state(checkpoint), source=f"resume={path}")
    except CheckpointMismatch as error:
        raise CheckpointMismatch(
            source=f"resume={path}",
            missing=error.missing,
            unexpected=error.unexpected,
            shapes=error.shapes,
            remedy=remedy,
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into host memory with ``weights_only=True``; of a run's directory, its best one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than plain values and tensors, or is no checkpoint at all.
    """
    best = Path(path) / "checkpoints" / "best.ckpt"
    found = read_plain(best if best.is_file() else path, "checkpoint")
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint {path} holds a {type(found).__name__}, not a dictionary")
    return found


def read_stamp(path: str | Path, checkpoint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the stamp of a checkpoint: see ``detseg.stamp.make_stamp`` for its keys.

    Args:
        path: the file, for reading and for messages.
        checkpoint: its content, if it was read already.

    Raises:
        ValueError: there is no stamp, or one of a later format.
    """
    content = read_checkpoint(path) if checkpoint is None else checkpoint
    stamp = content.get(STAMP_KEY)
    if not isinstance(stamp, dict):
        raise ValueError(
            f"checkpoint {path} has no stamp under {STAMP_KEY!r} (its keys: {', '.join(map(str, list(content)[:8]))}). "
            "Train with the callback detseg.callbacks.CheckpointStamp, or build the model by hand and call "
            "detseg.checkpoint.init_from(model, path)"
        )
    if stamp.get("format") != STAMP_FORMAT:
        raise ValueError(
            f"checkpoint {path} has a stamp of format {stamp.get('format')}, this detseg reads {STAMP_FORMAT}; "
            f"it was written by {stamp.get('versions')}"
        )
    return stamp


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's own weights: of a Lightning checkpoint those under ``model.``, of a state dict all.

    Where the run kept an average of its weights, Lightning has put that average here.
    """
    state = checkpoint.get("state_dict", checkpoint)
    inner = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return inner or {key: value for key, value in state.items() if isinstance(value, Tensor)}


def without_downloads(node: Any) -> Any:
    """Return a model's config in which nothing asks for published weights: they would be replaced at once.

    ``weights`` that are numbers (of a box coder, of classes in a loss) stay.
    """
    if isinstance(node, list):
        return [without_downloads(item) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {key: without_downloads(value) for key, value in node.items()}
    for key, value in node.items():
        if key == "weights" or key.endswith("_weights") or key.startswith("weights_"):
            changed[key] = None if isinstance(value, str) else changed[key]
        elif key == "pretrained":
            changed[key] = False
    return changed


def _part(stamp: Mapping[str, Any], key: str, path: str | Path) -> Any:
    value = stamp.get(key)
    if value is None or value == {}:
        raise ValueError(
            f"checkpoint {path}: its stamp has no {key}, as when a model was built by hand; "
            "build it again and call detseg.checkpoint.init_from(model, path)"
        )
    return value


def _check_classes(model: nn.Module, stamp: Mapping[str, Any], path: str | Path) -> None:
    """Raise if the file was trained for another number of classes."""
    own, names = getattr(model, "num_classes", None), stamp.get("class_names")
    theirs = (stamp.get("model") or {}).get("num_classes", None if names is None else len(names))
    if own is not None and theirs is not None and own != theirs:
        raise CheckpointMismatch(
            source=f"checkpoint {path}",
            remedy=f"It was trained for {theirs} classes ({', '.join(names or [])}), the model has {own}. "
            "Set drop_head=true to re-use the body alone",
        )
