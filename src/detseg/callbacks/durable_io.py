"""How Lightning reads and writes checkpoint files here: sealed, atomically, and never with NaN or infinity in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from detseg.durable import write_sealed
from detseg.nn.weights import read_plain

FINITE = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
"""Parts of a checkpoint that training or a model goes on from; the rest (best scores, say) may begin at infinity."""
LAST = "last"
"""Name without ending of the file that training goes on from; the one before it is kept."""


class DurableIO(CheckpointIO):
    """Lightning's plugin for checkpoint files, for ``Trainer(plugins=[DurableIO()])``; ``detseg.build`` adds it.

    A file ``last.ckpt`` that is replaced becomes ``last-1.ckpt``.
    """

    def __init__(self) -> None:
        self._failures: list[Exception] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint with its seal, or leave everything as it is.

        Args:
            checkpoint: what Lightning collected.
            path: of the file.
            storage_options: not used.

        Raises:
            FloatingPointError: weights or optimiser state hold NaN or infinity.
            WriteFailed: the disk is full, read-only or broken.
        """
        try:
            check_finite(checkpoint, path)
            write_sealed(checkpoint, path, previous=previous_of(path))
        except (OSError, FloatingPointError) as error:
            if self._failures is None:
                raise
            self._failures.append(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into host memory after comparing it with its seal.

        Args:
            path: of the file.
            map_location: not used: the weights move when they are copied into the model.
            weights_only: not used: nothing else is ever read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, foreign, or holds more than plain values and tensors.
        """
        found = read_plain(path, "checkpoint")
        if not isinstance(found, dict):
            raise ValueError(f"checkpoint {path} holds a {type(found).__name__}, not a dictionary")
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file that may be gone already."""
        Path(path).unlink(missing_ok=True)

    @contextmanager
    def collected(self) -> Iterator[list[Exception]]:
        """Collect what goes wrong instead of raising it, while several processes must stay together.

        Only the first process writes; an error raised there at once would leave the others waiting for it.
        """
        self._failures = []
        try:
            yield self._failures
        finally:
            self._failures = None


def previous_of(path: str | Path) -> Path | None:
    """Return where the file before ``last.ckpt`` is kept, and ``None`` for all other names."""
    path = Path(path)
    return path.with_name(f"{LAST}-1{path.suffix}") if path.stem == LAST else None


def check_finite(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raise if weights or optimiser state hold NaN or infinity.

    Args:
        checkpoint: what is to be written.
        path: where, for the message.

    Raises:
        FloatingPointError: names the first keys with their counts.
    """
    found = non_finite({key: checkpoint[key] for key in FINITE if key in checkpoint})
    if found:
        shown = "; ".join(
            f"{key}: {nan} NaN, {infinite} infinite of {size}" for key, (nan, infinite, size) in list(found.items())[:3]
        )
        more = f" and {len(found) - 3} tensors more" if len(found) > 3 else ""
        raise FloatingPointError(
            f"{path} is not written, as it would hold numbers that are not finite ({shown}{more}). Earlier checkpoints "
            "are as they were; lower optimizer.lr or trainer.gradient_clip_val, or train in 32 bits, and go on from one"
        )


def non_finite(content: Any) -> dict[str, tuple[int, int, int]]:
    """Return the tensors inside ``content`` that are not finite: path to (NaN, infinite, all elements).

    The extremes of each are looked at, so a healthy checkpoint costs one pass, and one wait for each device.
    """
    tensors = {key: value for key, value in _tensors(content, "") if value.is_floating_point() and value.numel()}
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in tensors.items():
        groups.setdefault((value.device, value.dtype), []).append(key)
    found = {}
    for keys in groups.values():
        extremes = torch.stack([_extremes(tensors[key]) for key in keys])  # (tensors, 2)
        for key, fine in zip(keys, extremes.isfinite().all(dim=1).tolist(), strict=True):
            if not fine:
                value = tensors[key].detach()
                found[key] = (int(value.isnan().sum()), int(value.isinf().sum()), value.numel())
    return found


@torch.no_grad()
def _extremes(value: Tensor) -> Tensor:
    """Return the least and the greatest element, both NaN where there is one: 16 times as fast as the largest norm."""
    return torch.stack(torch.aminmax(value.float() if value.element_size() == 1 else value))  # none for 8-bit floats


def _tensors(node: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside ``node`` with the keys that lead to it."""
    if isinstance(node, Tensor):
        yield path, node
        return
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        yield from _tensors(value, f"{path}.{key}" if path else str(key))
