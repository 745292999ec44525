"""Errors that say too little: out of memory (which batch, what to lower), dead data workers, full disks, lone cells."""

from __future__ import annotations

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from detseg.config import Run
from detseg.data.watch import died
from detseg.structures import Batch

SIGNS = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED|bad.alloc", re.IGNORECASE
)
"""How torch's allocators, CUDA and cuDNN say it where the error's class does not."""


LONE = re.compile(r"Expected more than 1 value per channel when training, got input size torch\.Size\(\[(.*)\]\)")
"""How torch's batch norm refuses a map of one cell in a batch of one."""


class OutOfMemory(MemoryError):
    """The device or the host has no memory left; the message names the batch and what to lower."""


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn torch's errors about memory and dead data workers into ones that say what to do.

    A dead worker's signal may reach the process anywhere in a step, not only in the loader, which knows it already.
    The tensors that the failed step held are let go, so that the next trial of a sweep in this process has room.

    Raises:
        OutOfMemory: the block ran out of memory; the message has the batch's shapes and what to lower.
        DataError: a data worker died; the message has the image that it read.
        OSError: the disk is full; the message says which.
        ValueError: a batch norm sees one value per channel; the message says what to raise.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or error.strerror != os.strerror(errno.ENOSPC):  # checkpoints say it themselves
            raise
        raise OSError(errno.ENOSPC, _disk_full(Path(run.cfg.paths.output_dir))) from error
    except ValueError as error:
        lone = LONE.fullmatch(str(error))
        if lone is None:
            raise
        raise ValueError(_lone_cell(run, lone[1])) from error
    except (RuntimeError, MemoryError) as error:
        dead = died(error)
        if dead is not None:
            raise dead from error
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        told = describe(run, error)
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(told) from error


def _lone_cell(run: Run, shape: str) -> str:
    batch: Batch | None = getattr(run.data, "last_batch", None)
    place = "" if batch is None else f" of {_shapes(batch)}"
    return (
        f"batch norm cannot train on a map of shape ({shape}): one value per channel has no variance. It is the "
        f"coarsest map{place}; raise data.batch_size={run.cfg.data.get('batch_size')} to 2 or more, or the images' size"
    )


def _disk_full(directory: Path) -> str:
    free = shutil.disk_usage(directory).free / 2**20
    return f"the disk is full: {free:.1f} MiB are free where {directory} lies; make room, then resume={directory}"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory: of a GPU, of the host, or of Python itself."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and SIGNS.search(str(error)) is not None


def describe(run: Run, error: BaseException) -> str:
    """Return the message: where, with which batch, what to lower, and what the allocator said."""
    batch: Batch | None = getattr(run.data, "last_batch", None)
    place = "" if batch is None else f" with {_shapes(batch)}"
    return (
        f"out of memory on {run.task.device} in step {run.trainer.global_step}{place}. "
        f"Lower {', or '.join(_remedies(run, batch))}. The allocator: {_said(error)}"
    )


def _shapes(batch: Batch) -> str:
    count, channels, height, width = batch.images.shape
    objects = [len(target) for target in batch.targets]
    kind = "training" if batch.truths is None else "evaluation"
    masks = [target.masks for target in batch.targets if target.masks is not None]
    size = sum(mask.numel() for mask in masks) / 2**20
    shown = f", whose masks are {size:.0f} MiB" if masks else ""
    return (
        f"a batch of {kind}: images ({count}, {channels}, {height}, {width}), "
        f"{sum(objects)} objects (most in one image: {max(objects, default=0)}){shown}"
    )


def _remedies(run: Run, batch: Batch | None) -> list[str]:
    """Return what of this run's own config can be lowered, with its value."""
    data: dict[str, Any] = dict(run.cfg.data)
    evaluation = batch is not None and batch.truths is not None
    key = "eval_batch_size" if evaluation and data.get("eval_batch_size") else "batch_size"
    found = []
    size = int(data.get(key) or 1)
    if size > 1:
        half = (
            "" if evaluation else f" (halve it and set trainer.accumulate_grad_batches={_doubled(run)}: the same step)"
        )
        found.append(f"data.{key}={size}{half}")
    if data.get("image_size"):
        found.append(f"data.image_size={data['image_size']}")
    else:
        found.append("the sizes in the transform group")
    if str(run.cfg.trainer.precision).startswith("32"):
        found.append("trainer.precision to bf16-mixed")
    return found


def _doubled(run: Run) -> int:
    return 2 * int(run.cfg.trainer.accumulate_grad_batches or 1)


def _said(error: BaseException) -> str:
    """Return the allocator's first two sentences: what it wanted and what there is."""
    text = " ".join(str(error).split())
    return ". ".join(re.split(r"\. (?=[A-Z])", text)[:2])[:300] or type(error).__name__
