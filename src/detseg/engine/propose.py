"""What ``detseg propose`` does, for notebooks too: make the proposals of a data set, and measure what they cover."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor

from detseg.config import instantiate
from detseg.experiment import write_json, write_run_files
from detseg.structures import Detections

if TYPE_CHECKING:
    from detseg.data.module import DetectionData
    from detseg.data.proposals import Filling
    from detseg.metrics import ProposalRecall


@dataclass
class SplitProposals:
    """The proposals of one split.

    Attributes:
        split: its name.
        filling: how many of its images had none yet, and what making them took.
        boxes: proposals per image, on average.
        figures: of ``ProposalRecall``; NaN is n/a.
        place: folder that they are kept in; ``None`` where none could be written.
    """

    split: str
    filling: Filling
    boxes: float
    figures: dict[str, float]
    place: Path | None = None


@dataclass
class Proposed:
    """What ``propose`` leaves behind.

    Attributes:
        directory: of the figures and pictures.
        maker: what made the proposals, with every parameter.
        splits: one entry each.
        files: written files worth looking at.
    """

    directory: Path
    maker: str
    splits: list[SplitProposals]
    files: list[Path] = field(default_factory=list)


def propose(cfg: DictConfig) -> Proposed:
    """Make all missing proposals of the splits asked for, and measure their recall.

    Writes ``metrics.json`` and a picture per split into a new directory; the proposals lie beside the data.

    Args:
        cfg: from ``load_config(..., name="propose")``.

    Raises:
        ConfigError: the config does not fit.
        DataError: there is no such split, or its files are broken.
    """
    from detseg.metrics import ProposalRecall

    allow = list(cfg.allow)
    data: DetectionData = instantiate(cfg.data, allow=allow, path="data")
    data.proposer = instantiate(cfg.proposals, allow=allow, path="proposals")
    data.eval_transform = None  # boxes and truth in the photos' own pixels
    data.num_workers = (os.cpu_count() or 1) if cfg.workers is None else int(cfg.workers)
    directory = Path(cfg.paths.output_dir)
    wanted = data.splits if cfg.splits is None else list(cfg.splits)
    metric = ProposalRecall(
        limits=list(cfg.limits)
    )  # wrong limits are told before hours of work, as an unknown split is
    for split in wanted:
        data.dataset(split)
    write_run_files(cfg, directory)
    found = [_measured(data, split, metric, directory) for split in wanted]
    told = {one.split: {**one.figures, "boxes": one.boxes, "made": one.filling.made} for one in found}
    files = [directory / f"proposals_{split}.png" for split in wanted]
    files.append(write_json(directory / "metrics.json", told))
    return Proposed(directory, data.proposer.key if data.proposer else "", found, files)


def _measured(data: DetectionData, split: str, metric: ProposalRecall, directory: Path) -> SplitProposals:
    """Fill one split, measure it and draw its recall."""
    from detseg import visualize
    from detseg.callbacks.curves import pictures
    from detseg.data.proposals import ProposedDataset

    samples = data.samples(split)
    assert isinstance(samples, ProposedDataset)
    filling = samples.fill(workers=data.num_workers)
    metric.reset()
    boxes = 0
    for batch in data.eval_dataloader(split):
        metric.update([ranked(proposals) for proposals in batch.proposals], batch.truths)
        boxes += sum(map(len, batch.proposals))
    values = metric.compute()
    visualize.save(pictures({"proposal": values}, data.class_names)["proposals"], directory / f"proposals_{split}.png")
    figures = {name: float(value) for name, value in values.items() if value.ndim == 0}
    place = next((place for place in samples.cache.places if place.is_dir()), None)
    return SplitProposals(split, filling, boxes / len(samples), figures, place)


def ranked(boxes: Tensor) -> Detections:
    """Return boxes ``(N, 4)``, best first, as detections whose scores fall from 1 towards 0, all of label 0."""
    count = len(boxes)
    scores = torch.arange(count, 0, -1, dtype=torch.float32) / max(1, count)
    return Detections(boxes, scores, torch.zeros(count, dtype=torch.int64))
