"""Loading a state dict so that every difference is seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detseg.durable import Damaged, read_sealed

log = logging.getLogger(__name__)

HEADS = ("fc", "classifier", "head", "heads")
"""First names of the layers that timm and torchvision, and our segmenters, classify with."""

BRANCH_HEADS = ("box.predictor.", "box.svms.", "box.ridge.")
"""What has one output per class in a detector whose network is the head of a region, as in R-CNN."""


class CheckpointMismatch(ValueError):
    """A state dict does not fit a module; the message shows both sides.

    Args:
        source: where the state came from.
        missing: keys that the module has and the file has not.
        unexpected: keys that the file has and the module has not.
        shapes: key, shape in the file, shape in the module.
        remedy: what the user can do.
    """

    def __init__(
        self,
        *,
        source: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        shapes: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        remedy: str = "",
    ) -> None:
        self.missing, self.unexpected, self.shapes = list(missing), list(unexpected), list(shapes)
        pairs = [f"{key} {file} in the file, {own} in the model" for key, file, own in shapes]
        parts = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (
                ("keys only in the model", self.missing),
                ("keys only in the file", self.unexpected),
                ("keys of another shape", pairs),
            )
            if names
        ]
        said = [f"{source} does not fit the model", "; ".join(parts), remedy]
        super().__init__(". ".join(part for part in said if part))


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], *, drop_head: bool = False, source: str = "state dict"
) -> list[str]:
    """Copy ``state`` into ``module``; half precision is cast to what the module has.

    Args:
        module: the network to fill.
        state: name to tensor. ``num_batches_tracked`` may differ: nothing here reads it.
        drop_head: let the parts that are no backbone differ; they keep their initial values and are logged. In a
            module with keys ``backbone.*`` that is every other key, else those in ``HEADS`` or ``BRANCH_HEADS``.
        source: where the state came from, for messages.

    Returns:
        The keys that were left out, on either side.

    Raises:
        CheckpointMismatch: keys or shapes differ.
    """
    own = {key: value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        (key, tuple(state[key].shape), tuple(own[key].shape))
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    dropped = [key for key in [*missing, *unexpected, *(row[0] for row in shapes)] if drop_head and _is_head(key, own)]
    missing, unexpected = [[key for key in keys if key not in dropped] for keys in (missing, unexpected)]
    shapes = [row for row in shapes if row[0] not in dropped]
    if missing or unexpected or shapes:
        remedy = (
            ""
            if drop_head
            else "Set drop_head=True to re-use the body alone, or build the model with the file's own sizes"
        )
        raise CheckpointMismatch(source=source, missing=missing, unexpected=unexpected, shapes=shapes, remedy=remedy)
    if dropped:
        log.info("%s: %d keys are not loaded, as asked: %s", source, len(dropped), _some(dropped))
    module.load_state_dict({key: state[key] for key in own if key in state and key not in dropped}, strict=False)
    return dropped


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a plain state dict from a file, with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else than names and tensors.
    """
    state = read_plain(path, "weights file")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        kinds = sorted(str(key) for key in state)[:5] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"weights file {path} holds {kinds}, not a plain state dict of tensors; "
            "for a detseg checkpoint use init_from"
        )
    return state


def read_plain(path: str | Path, what: str) -> Any:
    """Read a file of torch's into host memory with ``weights_only=True``, so that nothing in it runs.

    Args:
        path: the file.
        what: it is, for messages, such as ``"checkpoint"``.

    A file with a seal, as detseg writes them, is compared with it first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no file of torch's, or holds more than plain values and tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist (looked from {Path.cwd()})")
    try:
        return read_sealed(path)
    except OSError:
        raise
    except Damaged as error:
        raise ValueError(f"{what} {error}; take an earlier one, such as last-1.ckpt or best.ckpt beside it") from error
    except Exception as error:  # a foreign file can make the unpickler fail in any way
        raise ValueError(
            f"{what} {path} cannot be read with weights_only=True: {_reason(error)}. It is none, is damaged, or holds "
            "Python objects, which could run code of their own; let the program that wrote it save a plain state dict"
        ) from error


def _reason(error: Exception) -> str:
    """Return what was wrong with a file, without torch's advice to read it unsafely."""
    said = str(error).partition("WeightsUnpickler error:")
    return (said[2] or said[0]).strip().splitlines()[0].partition(". Please use")[0] if str(error).strip() else "empty"


def _is_head(key: str, own: Mapping[str, Tensor]) -> bool:
    if any(name.startswith("backbone.") for name in own):
        return not key.startswith("backbone.")
    return key.split(".")[0] in HEADS or key.startswith(BRANCH_HEADS)


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
