"""What follows the training of R-CNN and SPP-net: features of the training split, SVMs, regression of boxes.

Girshick et al. 2014, `"R-CNN" <https://arxiv.org/abs/1311.2524>`_, section 2.3 and appendices B and C. Each stage reads
what the one before wrote into ``<run>/stages/<key>`` and leaves a sealed file there, so that a run that was killed goes
on with the next, and within the first with the next image. The key is made of the trained weights and of the config of
model and data: after more training, or with other numbers, all are made anew. What is fitted goes into the last
checkpoint, which becomes the best.

On disk each image has a file of its own with features in half precision: of its objects, of all proposals that are a
negative of some class, and ``pool5`` of those near an object. That is 2 bytes x proposals x numbers of a region and
image (16 MB with 2,000 proposals and fc7 of AlexNet, 50 KB with 200 and 128 numbers); they go once all is fitted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from detseg.callbacks import Checkpoint
from detseg.callbacks.pruning import was_pruned
from detseg.checkpoint import init_from, read_checkpoint
from detseg.config import ConfigError, Run
from detseg.durable import Damaged, check_seal, read_sealed, write_sealed
from detseg.models.region_svms import RegionExamples
from detseg.models.svm_branch import SVMBranch
from detseg.models.two_stage import TwoStageDetector
from detseg.structures import Batch
from detseg.tasks.base import COUNT

log = logging.getLogger(__name__)

FOLDER = "stages"
"""In a run's directory."""
FITTED = ("box.svms.", "box.ridge.")
"""What the names of fitted buffers begin with in a model's state."""
ASIDE = ("num_workers", "batch_size", "eval_batch_size", "pin_memory", "cache_mb")
"""Keys of the data's config that change no feature."""
EVERY = 15.0  # seconds between two lines about the features


def stages_of(model: nn.Module) -> list[str]:
    """Return what a model fits after its training, ``svm`` and ``ridge``; nothing for most models."""
    branch = getattr(model, "box", None)
    return branch.stages if isinstance(model, TwoStageDetector) and isinstance(branch, SVMBranch) else []


def check_stages(run: Run) -> None:
    """Refuse several processes, before hours of training: one process fits, and the others would wait for it.

    Raises:
        ConfigError: the run has several, and its model fits something after training.
    """
    stages, world = stages_of(run.task.model), run.trainer.world_size
    if stages and world > 1:
        raise ConfigError(
            f"{type(run.task.model).__name__} fits {' and '.join(stages)} after training, in one process alone, and "
            f"this run has {world}; set trainer.devices=1, or model.box.classifier=softmax and "
            "model.box.box_regression=false for its fine-tuning alone"
        )


def fit_stages(run: Run) -> bool:
    """Fit what the model fits after training, and keep it in the last checkpoint, which becomes the best.

    Does nothing for other models, for a run that was given up, and with ``trainer.fast_dev_run``.

    Args:
        run: after ``run.trainer.fit``; by hand too.

    Returns:
        Whether anything was fitted.

    Raises:
        ValueError: the training split has no object, or no proposal near one.
        WriteFailed: the disk is full.
    """
    model, stages = run.task.model, stages_of(run.task.model)
    if not stages or was_pruned(run.trainer) or getattr(run.trainer, "fast_dev_run", False):
        return False
    source = _source(run)
    if source is not None:
        init_from(model, source)  # with an average of weights, that average
    else:
        log.warning("no checkpoint is kept: what is fitted now stays in memory alone")
    place = Path(run.cfg.paths.output_dir) / FOLDER / key_of(run)
    for other in place.parent.glob("*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)  # of weights, or a config, that are no more
    model.to(run.trainer.strategy.root_device).eval()
    _fit(run, cast(TwoStageDetector, model), stages, place)
    if source is not None:
        _keep(run, source)
    shutil.rmtree(place / "features", ignore_errors=True)
    return True


def log_fitted(run: Run, figures: Mapping[str, float]) -> None:
    """Send the figures of the fitted model to the loggers, as a last validation at the last step."""
    known = {f"val/{name}": value for name, value in figures.items() if not (math.isnan(value) or COUNT.search(name))}
    for logger in run.trainer.loggers:
        logger.log_metrics(known, step=run.trainer.global_step)


def key_of(run: Run) -> str:
    """Return the name of what is fitted to these weights with this config, 12 digits."""
    digest = hashlib.sha256()
    for name, value in sorted(run.task.model.state_dict().items()):
        if not name.startswith(FITTED):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = cast(dict[str, Any], OmegaConf.to_container(run.cfg, resolve=True))
    data = {key: value for key, value in config["data"].items() if key not in ASIDE}
    told = {"model": config["model"], "data": data, "images": _images(run)}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


def _fit(run: Run, model: TwoStageDetector, stages: list[str], place: Path) -> None:
    """Take every stage that is not there yet."""
    branch = cast(SVMBranch, model.box)
    branch.forget()
    work: dict[str, tuple[nn.Module, Callable[[Any], list[int]]]] = {
        "svm": (branch.svms, branch.fit_svms),
        "ridge": (branch.ridge, branch.fit_ridge),
    }
    for stage in stages:
        module, fit = work[stage]
        done = place / f"{stage}.pt"
        found = _read(done)
        if found is None:
            images = partial(_examples, place, _extract(run, model, place))
            started = time.monotonic()
            examples = fit(images)
            found = {"state": {key: value.cpu() for key, value in module.state_dict().items()}, "examples": examples}
            write_sealed(found, done)
            _say(stage, examples, run.task.class_names, time.monotonic() - started)
        else:
            log.info("stage %s was done: %s", stage, done)
        module.load_state_dict(found["state"])


def _extract(run: Run, model: TwoStageDetector, place: Path) -> int:
    """Write the features of the training split, without augmentation; return the number of images."""
    done, folder, limit = place / "features.pt", place / "features", _images(run)
    found = _read(done)
    if found is not None and sum(1 for _ in folder.glob("*.pt")) >= found["images"]:
        return int(found["images"])
    image, made, started, said = 0, 0, time.monotonic(), time.monotonic()
    for batch in run.data.eval_dataloader("train"):
        rows = range(min(len(batch), limit - image))
        missing = [row for row in rows if not _is_whole(_file(folder, image + row))]
        if missing:
            _write_batch(run, model, batch, {row: _file(folder, image + row) for row in missing})
        image, made = image + len(rows), made + len(missing)
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            log.info("features of %d of %d images, %.0f s", image, limit, said - started)
        if image >= limit:
            break
    size = sum(path.stat().st_size for path in folder.glob("*.pt")) / 1e6
    log.info("features of %d images (%d new) in %.0f s, %.0f MB", image, made, time.monotonic() - started, size)
    write_sealed({"images": image}, done)
    return image


@torch.no_grad()
def _write_batch(run: Run, model: TwoStageDetector, batch: Batch, files: Mapping[int, Path]) -> None:
    """Write the examples of some rows of a batch, each into its own file."""
    branch, device = cast(SVMBranch, model.box), run.trainer.strategy.root_device
    batch = run.data.on_after_batch_transfer(run.data.transfer_batch_to_device(batch, device, 0), 0)
    images = batch.images.contiguous(memory_format=run.task.layout)  # (B, 3, H, W)
    with run.trainer.precision_plugin.forward_context():
        outputs = model(images, batch.sizes, proposals=batch.proposals)
        proposals = model.proposals(outputs, batch.sizes)
        for row, path in files.items():
            found = branch.examples(outputs.features, row, proposals[row].boxes, batch.targets[row], model.strides)
            write_sealed(asdict(found), path)


def _examples(place: Path, count: int) -> Iterator[RegionExamples]:
    """Yield the examples of every image; what is not looked at is not read."""
    for image in range(count):
        path = _file(place / "features", image)
        content: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        yield RegionExamples(**content)


def _keep(run: Run, source: Path) -> None:
    """Write the fitted buffers into the checkpoint that was fitted to."""
    content = read_checkpoint(source)
    fitted = {key: value.cpu() for key, value in run.task.model.state_dict().items() if key.startswith(FITTED)}
    for part in ("state_dict", "current_model_state"):
        if part in content:
            content[part] |= {f"model.{key}": value for key, value in fitted.items()}
    callback = run.trainer.checkpoint_callback
    if isinstance(callback, Checkpoint):
        callback.crown(run.trainer, content)


def _source(run: Run) -> Path | None:
    """Return the checkpoint with the weights to fit to: of the last epoch, where one is kept."""
    callback = run.trainer.checkpoint_callback
    if not isinstance(callback, Checkpoint):
        return None
    names = [callback.last_model_path, callback.best_model_path, run.cfg.resume]
    return next((Path(name) for name in names if name and Path(name).is_file()), None)


def _images(run: Run) -> int:
    """Return how many images of the training split are looked at: no more than an epoch was limited to."""
    whole, limit = len(run.data.dataset("train")), run.trainer.limit_train_batches
    return min(whole, limit * run.data.batch_size if isinstance(limit, int) else max(1, int(whole * limit)))


def _say(stage: str, counts: list[int], names: list[str], seconds: float) -> None:
    """Log what a stage was fitted to, and warn of classes that had nothing."""
    what = {"svm": "objects", "ridge": "proposals near an object"}[stage]
    told = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    log.info("stage %s in %.1f s, from %s: %s", stage, seconds, what, told)
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    then = {"svm": "it is never predicted", "ridge": "its boxes stay as proposed"}[stage]
    if empty:
        log.warning("stage %s: the training split has no %s of %s; %s", stage, what, ", ".join(empty), then)


def _file(folder: Path, image: int) -> Path:
    return folder / f"{image:06d}.pt"


def _is_whole(path: Path) -> bool:
    """Say whether a file is as it was written; one that is not is made again."""
    try:
        return check_seal(path) is not None
    except (Damaged, OSError):
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a finished stage wrote, ``None`` where it did not come to its end."""
    return cast(dict[str, Any], read_sealed(path)) if _is_whole(path) else None
