"""What a rank does in the tests of metrics on several processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torchmetrics import Metric

from detseg.metrics import CocoAP, MaskQuality, MeanIoU, ProposalRecall, VocAP
from detseg.structures import Detections, SemanticMap, Target
from metric_oracles import random_case

IMAGES = 7
CLASSES = 5
Images = tuple[list[Detections], list[Target], list[SemanticMap]]


def images() -> Images:
    """Return seven images with everything that any metric reads: ties, crowds, masks, two images without objects."""
    case = random_case(90, masks=True, tied=True)
    assert len(case.targets) == IMAGES
    generator = torch.Generator().manual_seed(0)
    maps = []
    for target in case.targets:
        labels = torch.randint(0, CLASSES, (12, 9), generator=generator)
        maps.append(SemanticMap(torch.where(torch.rand((12, 9), generator=generator) < 0.6, labels, labels.flip(0))))
        labels[torch.rand((12, 9), generator=generator) < 0.1] = 255
        target.semantic = SemanticMap(labels)
        target.difficult = torch.rand(len(target), generator=generator) < 0.2
    return case.detections, case.targets, maps


def metrics() -> dict[str, Metric]:
    """Return one of each metric."""
    return {
        "boxes": CocoAP(num_classes=CLASSES),
        "masks": CocoAP(iou_type="segm", class_names=list("abcde")),
        "any classes": CocoAP(),
        "voc 2007": VocAP(style="2007", num_classes=CLASSES),
        "voc 2010": VocAP(num_classes=CLASSES),
        "semantic": MeanIoU(num_classes=CLASSES),
        "proposals": ProposalRecall(limits=(1, 5, 20)),
        "quality": MaskQuality(),
    }


def results(mine: list[int], step: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """Update every metric with some of the images, ``step`` at a time, and compute."""
    detections, targets, maps = images()
    computed = {}
    for name, metric in metrics().items():
        for at in range(0, len(mine), step):
            chosen = mine[at : at + step]
            found = maps if name == "semantic" else detections
            metric.update([found[i] for i in chosen], [targets[i] for i in chosen])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank with nothing computes before any update: meant
            computed[name] = metric.compute()
        if name == "boxes":  # after the gathering, a rank has its own images again
            assert len(metric.rows("images")) == len(mine)
    return computed


def rank(number: int, world: int, folder: str, shares: list[list[int]]) -> None:
    """Join the group, take the share of each round, and write what was computed.

    Args:
        number: this rank.
        world: how many there are.
        folder: where ranks meet and leave their results.
        shares: per round, how many images each rank takes.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    try:
        for turn, share in enumerate(shares):
            start = sum(share[:number])
            torch.save(results(list(range(start, start + share[number]))), Path(folder) / f"{turn}-{number}.pt")
    finally:
        dist.destroy_process_group()
