"""What ``detseg anchors`` does, for notebooks too: find priors for a data set, by k-means under 1 - IoU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

from detseg.atomic import write_atomic
from detseg.config import ConfigError, instantiate
from detseg.experiment import write_json, write_run_files
from detseg.ops.size_clusters import cluster_sizes, mean_best_iou
from detseg.targets.crowds import learnable

if TYPE_CHECKING:
    from detseg.data.module import DetectionData


@dataclass
class Anchors:
    """What ``anchors`` leaves behind.

    Attributes:
        directory: of its files.
        boxes: how many there were.
        sizes: per level, finest first, [width, height] in pixels of the training size.
        mean_iou: of a box with its best anchor, as they are rounded.
        by_count: the same for each smaller number of anchors, not rounded (the paper's figure 2).
        files: written files worth looking at.
    """

    directory: Path
    boxes: int
    sizes: list[list[list[float]]]
    mean_iou: float
    by_count: dict[int, float]
    files: list[Path] = field(default_factory=list)

    @property
    def override(self) -> str:
        """What to add to a command, for a model whose anchors are a ``PriorGrid``."""
        text = ",".join(
            "[" + ",".join(f"[{width:g},{height:g}]" for width, height in level) + "]" for level in self.sizes
        )
        return f"model.anchors.sizes=[{text}]"


def anchors(cfg: DictConfig) -> Anchors:
    """Cluster the sizes of a split's boxes, as they are at the size of evaluation, which is that of training.

    Writes ``anchors.yaml``, which an experiment's file may take over, and ``metrics.json`` into a new directory.

    Args:
        cfg: from ``load_config(..., name="anchors")``.

    Raises:
        ConfigError: the anchors cannot be shared out among the levels, or there are too few different boxes.
        DataError: there is no such split, or its files are broken.
    """
    count, levels = int(cfg.count), int(cfg.levels)
    if levels < 1 or count < 1 or count % levels:
        raise ConfigError(f"count={count} anchors cannot be shared out among levels={levels}; give a multiple of it")
    data: DetectionData = instantiate(cfg.data, allow=list(cfg.allow), path="data")
    sizes = box_sizes(data, str(cfg.split))
    settings = {"seed": int(cfg.seed), "starts": int(cfg.starts), "iterations": int(cfg.iterations)}
    try:
        found = cluster_sizes(sizes, count, **settings)  # (K, 2)
    except ValueError as error:
        raise ConfigError(f"split {cfg.split}: {error}") from error
    rounded = _rounded(found, int(cfg.digits))  # (K, 2)
    by_count = {k: mean_best_iou(sizes, cluster_sizes(sizes, k, **settings)) for k in range(1, count)}
    by_count[count] = mean_best_iou(sizes, found)
    shared = rounded.view(levels, count // levels, 2).tolist()
    result = Anchors(Path(cfg.paths.output_dir), len(sizes), shared, mean_best_iou(sizes, rounded), by_count)
    write_run_files(cfg, result.directory)
    result.files = _write(result)
    return result


def box_sizes(data: DetectionData, split: str) -> Tensor:
    """Return width and height ``(N, 2)`` in pixels of all objects of a split that a detector would learn."""
    parts = [torch.zeros((0, 2))]
    for batch in data.eval_dataloader(split):
        parts += [(one.boxes[:, 2:] - one.boxes[:, :2]).float() for one in map(learnable, batch.targets)]
    return torch.cat(parts)


def _rounded(sizes: Tensor, digits: int) -> Tensor:
    """Return sizes ``(K, 2)`` rounded to so many digits, none of them to nothing."""
    scale = 10.0**digits
    return (sizes * scale).round().clamp(min=1) / scale


def _write(result: Anchors) -> list[Path]:
    path = result.directory / "anchors.yaml"
    text = yaml.safe_dump({"model": {"anchors": {"sizes": result.sizes}}}, default_flow_style=None, width=200)
    head = f"# {result.boxes} boxes, mean IoU {result.mean_iou:.4f}; for an experiment's file. On the command line:\n"
    write_atomic(path, f"{head}# '{result.override}'\n{text}")
    figures = {"boxes": result.boxes, "mean_iou": result.mean_iou}
    figures |= {f"mean_iou_{count}": value for count, value in result.by_count.items()}
    return [path, write_json(result.directory / "metrics.json", figures)]
