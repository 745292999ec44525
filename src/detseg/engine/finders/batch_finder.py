"""The largest batch that fits: sizes are tried in processes of their own, which may die of it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError, instantiate
from detseg.engine.finders.worst_batch import Worst, find_worst

MEMORY_SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
"""What ends a process that finds no memory: the system's killer, C++'s bad_alloc, and libraries that do not look."""


@dataclass(frozen=True)
class Attempt:
    """One batch size, tried.

    Attributes:
        images: per batch.
        fits: whether two optimiser steps went through.
        bytes: of memory at the most, where it fits.
        seconds: of one batch, where it fits.
        reason: why it does not fit, in one line.
    """

    images: int
    fits: bool
    bytes: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Found:
    """What the search came to.

    Attributes:
        images: the largest batch that fits; 0 where none does.
        attempts: in the order of trying.
        worst: what the batches were made of.
    """

    images: int
    attempts: list[Attempt]
    worst: Worst


def search(attempt: Callable[[int], Attempt], *, start: int, largest: int) -> list[Attempt]:
    """Double the size until it does not fit, then halve the gap until it is at most an eighth of what fits.

    Args:
        attempt: tries a number of images.
        start: the first number.
        largest: the last one worth trying.
    """
    attempts: list[Attempt] = []
    low, high = 0, largest + 1
    size = min(start, largest)
    while high - low > max(1, low // 8):
        attempts.append(attempt(size))
        if attempts[-1].fits:
            low = size
        else:
            high = size
        met = high <= largest
        size = (low + high) // 2 if met else min(2 * size, largest)
        if low == largest:
            break
    return attempts


def find_batch(cfg: DictConfig, *, tell: Callable[[Attempt], None] = lambda attempt: None) -> Found:
    """Find the largest ``data.batch_size`` that trains within the memory, on the worst batch that there can be.

    Args:
        cfg: from ``load_config(..., name="find")``; the trials' logs go to its run directory.
        tell: hears of every attempt at once.

    Raises:
        ConfigError: a number of ``find.batch`` is out of range.
        RuntimeError: a trial failed of something else than memory.
    """
    settings = cfg.find.batch
    if settings.start < 1 or settings.largest < 1 or not 0 <= settings.margin < 1:
        raise ConfigError(
            f"find.batch: needs start and largest of at least 1 and a margin in [0, 1), not start={settings.start}, "
            f"largest={settings.largest}, margin={settings.margin}"
        )
    directory = Path(cfg.paths.output_dir) / "batch_finder"
    directory.mkdir(parents=True, exist_ok=True)
    resolved, data = _with_classes(cfg)
    worst = find_worst(data, scan=settings.scan)
    worst.save(directory / "worst.pt")
    OmegaConf.save(resolved, directory / "config.yaml")
    limit = _memory_limit(resolved)

    def attempt(images: int) -> Attempt:
        result = try_size(images, directory, limit=limit, share=1 - settings.margin, timeout=settings.timeout)
        tell(result)
        return result

    largest = min(settings.largest, len(data.dataset("train")))
    attempts = search(attempt, start=settings.start, largest=largest)
    return Found(max((one.images for one in attempts if one.fits), default=0), attempts, worst)


def try_size(images: int, directory: Path, *, limit: int = 0, share: float = 1.0, timeout: float = 600.0) -> Attempt:
    """Try one batch size in a new process.

    Args:
        images: per batch.
        directory: with ``config.yaml`` and ``worst.pt``; receives ``<images>.log``.
        limit: bytes of main memory that it may take; 0: no limit.
        share: of the GPU's memory that it may take.
        timeout: seconds until it counts as failed.

    Raises:
        RuntimeError: it failed of something else than memory.
    """
    result, log = directory / f"{images}.json", directory / f"{images}.log"
    command = [
        sys.executable,
        "-m",
        "detseg.engine.finders.batch_trial",
        "--images",
        str(images),
        "--limit",
        str(limit),
    ]
    command += ["--share", str(share), "--config", str(directory / "config.yaml")]
    command += ["--worst", str(directory / "worst.pt"), "--result", str(result)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return Attempt(images, fits=False, reason=f"took longer than {timeout:g} s")
        finally:
            _end(process)
    said = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    return _judge(images, code, said, log)


def _judge(images: int, code: int, said: dict[str, Any], log: Path) -> Attempt:
    if "bytes" in said:
        return Attempt(images, fits=True, bytes=said["bytes"], seconds=said["seconds"])
    if "memory" in said:
        return Attempt(images, fits=False, reason=said["memory"])
    text = log.read_text(encoding="utf-8", errors="replace")
    if -code in MEMORY_SIGNALS or "MemoryError" in text or "bad_alloc" in text:
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Attempt(images, fits=False, reason=f"{ended}, as where memory runs out")
    lines = text.strip().splitlines() or [f"exit code {code}"]
    raise RuntimeError(f"the trial of {images} images failed: {said.get('error', lines[-1])} (see {log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the trial and whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _with_classes(cfg: DictConfig) -> tuple[DictConfig, Any]:
    """Return the resolved config, with the classes that the data have, and the data."""
    copy = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    data = instantiate(copy.data, allow=list(copy.allow), path="data")
    copy.data.num_classes, copy.find.class_names = data.num_classes, data.class_names
    OmegaConf.resolve(copy)
    return copy, data


def _memory_limit(cfg: DictConfig) -> int:
    """Return the bytes of main memory that a trial on a CPU may take, the margin left out; 0 for one on a GPU."""
    import torch

    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        return 0
    given = cfg.find.batch.memory_gb
    free = free_memory() if given is None else int(given * 1e9)
    return int(free * (1 - cfg.find.batch.margin))


def free_memory() -> int:
    """Return the bytes of main memory that are free, within this process's control group; 0 where nobody knows."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        bound, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if bound == "max" else min(free, max(0, int(bound) - int(used)))
    except (OSError, ValueError):
        return free


def override_line(found: int, wanted: int, accumulated: int = 1) -> str:
    """Return the overrides for a batch that fits, keeping the images per optimiser step where it is smaller.

    Args:
        found: images that fit.
        wanted: the config's ``data.batch_size``.
        accumulated: its ``trainer.accumulate_grad_batches``.
    """
    if found >= wanted:
        return f"data.batch_size={found}"
    batches = math.ceil(wanted * accumulated / found)
    return f"data.batch_size={math.ceil(wanted * accumulated / batches)} trainer.accumulate_grad_batches={batches}"
