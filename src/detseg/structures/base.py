"""Moves and checks that every structure shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor


class TensorFields:
    """Mixin for dataclasses whose fields are tensors, nested structures or lists of them.

    Lightning, and any ``DataLoader`` that pins memory, find ``to`` and ``pin_memory`` here.
    """

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy in which every tensor, however deep, went through ``function``."""
        changed = {field.name: _map(getattr(self, field.name), function) for field in fields(cast(Any, self))}
        return cast(Self, replace(cast(Any, self), **changed))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return a copy on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cpu(self) -> Self:
        """Return a copy in host memory."""
        return self.to("cpu")

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, from which copies to a GPU may overlap with work."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorFields):
        return value.map_tensors(function)
    if isinstance(value, list):
        return [_map(item, function) for item in value]
    return value


def check_rows(owner: str, count: int, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless every given tensor has ``count`` rows.

    Args:
        owner: what is checked, for the message, such as ``"Target of image 7"``.
        count: the number of objects, taken from the boxes.
        **tensors: per-object fields by name; ``None`` is skipped.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.ndim == 0 or tensor.shape[0] != count):
            raise ValueError(
                f"{owner}: {name} has shape {tuple(tensor.shape)}, but there are {count} boxes; "
                f"give one row of {name} per box"
            )


def check_boxes(owner: str, boxes: Tensor) -> None:
    """Raise unless ``boxes`` is a floating tensor ``(N, 4)`` of finite values.

    Values are looked at in host memory only: on a GPU the check would make the host wait.
    """
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        shape = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ValueError(
            f"{owner}: boxes must be (N, 4) in xyxy pixels, got {shape}; an empty image needs zeros((0, 4))"
        )
    if not boxes.is_floating_point():
        raise TypeError(f"{owner}: boxes must be floating point, got {boxes.dtype}; call boxes.float()")
    if boxes.device.type == "cpu" and not bool(boxes.isfinite().all()):
        row = int((~boxes.isfinite().all(dim=1)).nonzero()[0, 0])
        raise ValueError(f"{owner}: box {row} is {boxes[row].tolist()}; every coordinate must be finite")


def check_labels(owner: str, labels: Tensor) -> None:
    """Raise unless ``labels`` is a 1-d integer tensor without negative values (values looked at on the CPU only)."""
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"{owner}: labels must be (N,) int64, got {tuple(labels.shape)} {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel() and int(labels.min()) < 0:
        row = int((labels < 0).nonzero()[0, 0])
        raise ValueError(
            f"{owner}: label {row} is {int(labels[row])}; foreground labels are 0..num_classes-1, background has none"
        )


def check_masks(owner: str, masks: Tensor | None) -> None:
    """Raise unless ``masks`` is ``None`` or a bool tensor ``(N, H, W)``."""
    if masks is not None and (masks.ndim != 3 or masks.dtype != torch.bool):
        raise ValueError(f"{owner}: masks must be (N, H, W) bool, got {tuple(masks.shape)} {masks.dtype}")
