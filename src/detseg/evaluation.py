"""What ``detseg evaluate`` does, for notebooks too: measure a checkpoint, and write down what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from detseg.config import ConfigError, instantiate, load_config
from detseg.experiment import Outcome, write_json, write_run_files

if TYPE_CHECKING:
    from torch import nn

    from detseg.predictor import Predictor
    from detseg.tasks.base import Task

RECIPES = {"boxes": "detection", "instances": "instance", "semantic": "semantic"}
"""Kind of truth -> choice of the transform groups."""


def load_evaluation(*overrides: str) -> DictConfig:
    """Compose the config of ``evaluate``, in which the data are the checkpoint's own unless ``data=`` is chosen.

    Images of other data are resized as the checkpoint's own were, unless ``data.eval_transform.*`` says otherwise.

    Args:
        *overrides: as typed after ``detseg evaluate``, with ``ckpt=<path>``.

    Raises:
        ConfigError: there is no ``ckpt``, or an override names no key or choice.
        FileNotFoundError: there is no such checkpoint.
    """
    from hydra.core.config_store import ConfigStore

    from detseg.checkpoint import read_stamp

    stamp = read_stamp(_checkpoint(overrides))
    truth = stamp.get("truth") or "boxes"
    first = [f"truth={truth}"]
    if any(text.startswith("data=") for text in overrides):
        recipe = stamp.get("eval_transform")  # images of other data are resized as the model was trained for
        ConfigStore.instance().store(group="transform/eval", name="checkpoint", node=recipe)
        first += [
            f"transform/train@data.train_transform={RECIPES[truth]}",
            f"transform/eval@data.eval_transform={'checkpoint' if recipe else RECIPES[truth]}",
        ]
    else:
        ConfigStore.instance().store(group="data", name="checkpoint", node=_stamped_data(stamp))
        first += ["data=checkpoint"]
    return load_config(*first, *overrides, name="evaluate")


def evaluate(cfg: DictConfig) -> Outcome:
    """Measure a checkpoint and write ``predictions.json`` (COCO results) and ``metrics.json`` into a new directory.

    Semantic maps are written as index PNGs in ``predictions/``, named in ``predictions.json``.

    Args:
        cfg: from ``load_evaluation()``.

    Raises:
        ConfigError: the split does not exist.
        ValueError: the data have other classes than the checkpoint; the message gives both.
    """
    from lightning import seed_everything

    from detseg.callbacks.predictions import PredictionWriter
    from detseg.checkpoint import load, read_stamp

    if cfg.split not in ("val", "test"):
        raise ConfigError(f"split={cfg.split}: choose val or test")
    seed_everything(cfg.seed, workers=True, verbose=False)
    allow = list(cfg.allow)
    predictor = load(cfg.ckpt, allow=allow)
    data = instantiate(cfg.data, allow=allow, path="data")
    compare_classes(predictor.class_names, data.class_names, cfg.ckpt)
    data.proposer = getattr(predictor.model, "proposer", None)
    task = rebuild_task(predictor, read_stamp(cfg.ckpt), allow=allow, voc_ap=cfg.voc_ap)
    ask_as_told(predictor.model, cfg)
    directory = Path(cfg.paths.output_dir)
    writer = PredictionWriter(directory=directory, category_ids=data.category_ids)
    trainer = instantiate(
        cfg.trainer,
        allow=allow,
        path="trainer",
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    write_run_files(cfg, directory)
    (trainer.validate if cfg.split == "val" else trainer.test)(task, datamodule=data, verbose=False)
    figures = task.results[cfg.split]
    write_json(directory / "metrics.json", figures)
    return Outcome(
        directory=directory,
        figures=figures,
        monitor=task.monitor.partition("/")[2],
        class_names=task.class_names,
        checkpoint=Path(cfg.ckpt),
        files=[directory / "predictions.json", directory / "metrics.json"],
    )


def ask_as_told(model: nn.Module, cfg: DictConfig) -> None:
    """Set how a segmenter is asked, where ``cfg.inference`` says so.

    Raises:
        ConfigError: it says so, but the model is no segmenter.
    """
    if cfg.inference is None:
        return
    from detseg.models.inference import ask_by

    try:
        ask_by(model, instantiate(cfg.inference, allow=list(cfg.allow), path="inference"))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def rebuild_task(
    predictor: Predictor, stamp: Mapping[str, Any], *, allow: Sequence[str] = (), voc_ap: int | str | None = None
) -> Task:
    """Return the task that a checkpoint was trained with, for measuring only, around its model.

    Args:
        predictor: of the checkpoint.
        stamp: of the checkpoint.
        allow: packages allowed beside detseg's own list.
        voc_ap: 2007 or 2010 measures VOC's AP too; ``None`` does what the training did.

    Raises:
        ConfigError: the stamp has no task, or one without boxes for ``voc_ap``.
    """
    import torch

    node = ((stamp.get("config") or {}).get("task")) or {}
    if "_target_" not in node:
        raise ConfigError("the checkpoint's stamp has no task; train with `detseg train` or detseg.build")
    task: Task = instantiate(
        OmegaConf.create(node),
        allow=allow,
        path="task",
        model=predictor.model,
        optimizer=partial(torch.optim.SGD, lr=0.0),
        class_names=predictor.class_names,
        **({} if voc_ap is None else {"voc_ap": voc_ap}),
    )
    return task


def compare_classes(model: Sequence[str], data: Sequence[str], checkpoint: str) -> None:
    """Raise unless the checkpoint and the data have the same classes in the same order.

    Raises:
        ValueError: they differ; the message shows both lists.
    """
    if list(model) != list(data):
        raise ValueError(
            f"checkpoint {checkpoint} was trained for {len(model)} classes ({', '.join(model)}), the data have "
            f"{len(data)} ({', '.join(data)}); give data with the checkpoint's classes, in its order"
        )


def _checkpoint(overrides: Sequence[str]) -> str:
    """Return the value of ``ckpt=`` among overrides."""
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "ckpt" and value:
            return value.strip("'\"")
    raise ConfigError("which checkpoint? Give ckpt=<file>, such as ckpt=runs/.../checkpoints/best.ckpt")


def _stamped_data(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data section that a checkpoint was trained with."""
    data = (stamp.get("config") or {}).get("data")
    if not data:
        raise ConfigError("the checkpoint's stamp names no data (a model built by hand); choose some: data=<choice>")
    return dict(data)
