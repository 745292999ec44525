from __future__ import annotations

import math

import torch

from detseg.metrics import CocoAP, MeanIoU, table_rows
from detseg.structures import Detections, SemanticMap, Target


def coco() -> dict[str, torch.Tensor]:
    metric = CocoAP(class_names=["apple", "pear"])
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    found = Detections(boxes=boxes, scores=torch.tensor([0.9]), labels=torch.tensor([0]))
    metric.update([found], [Target(boxes=boxes, labels=torch.tensor([0]))])
    return metric.compute()


def test_rows_of_boxes() -> None:
    rows = dict(table_rows(coco(), ["apple", "pear"]))
    assert rows["map"] == rows["map_small"] == rows["map_per_class apple"] == "1.0000"
    assert rows["map_large"] == rows["mar_large"] == rows["map_50_per_class pear"] == "n/a (0 objects)"
    assert not any("count" in name for name in rows)
    assert dict(table_rows(coco()))["map_per_class 1"] == "n/a (0 objects)"


def test_rows_of_pixels_and_prefixes() -> None:
    metric = MeanIoU(num_classes=2)
    none = torch.zeros((0, 4))
    maps = SemanticMap(torch.zeros((2, 2)).long())
    metric.update([maps], [Target(boxes=none, labels=torch.zeros(0).long(), semantic=maps)])
    figures = {f"val/{key}": value for key, value in metric.compute().items()}
    rows = dict(table_rows(figures, ["sky", "grass"]))
    assert rows["val/miou"] == rows["val/iou_per_class sky"] == "1.0000"
    assert rows["val/iou_per_class grass"] == "n/a (0 pixels)"
    assert not any("count" in name for name in rows)


def test_rows_of_plain_numbers() -> None:
    figures = {"mask_map_large": math.nan, "mask_count_large": 0, "mask_map": 0.25, "speed": math.nan}
    assert table_rows(figures) == [
        ("mask_map_large", "n/a (0 objects)"),
        ("mask_map", "0.2500"),
        ("speed", "n/a (0 objects)"),
    ]


def test_counts_of_several_metrics_stay_apart() -> None:
    figures = {"map": 0.5, "count": 9, "mask_quality": math.nan, "mask_quality_count": 0, "ar_100": math.nan}
    rows = dict(table_rows(figures | {"ar_count": 0}))
    assert rows == {"map": "0.5000", "mask_quality": "n/a (0 objects)", "ar_100": "n/a (0 objects)"}
