from __future__ import annotations

import math

import pytest
import torch

from detseg.metrics import MaskQuality
from detseg.structures import Detections, Target


def rectangle(x1: int, y1: int, x2: int, y2: int) -> torch.Tensor:
    mask = torch.zeros((40, 40), dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def scene() -> tuple[Detections, Target]:
    """Two objects and a crowd. Found: the first well, again and worse; the second with half a mask; the crowd."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 20, 10, 30]])
    target = Target(
        boxes=boxes,
        labels=torch.tensor([0, 1, 0]),
        masks=torch.stack([rectangle(*map(int, box)) for box in boxes.tolist()]),
        iscrowd=torch.tensor([False, False, True]),
        image_id=3,
    )
    found = Detections(
        boxes=boxes[[0, 0, 1, 2, 0]],
        scores=torch.tensor([0.5, 0.9, 0.8, 0.7, 0.95]),
        labels=torch.tensor([0, 0, 1, 0, 1]),  # the last has the wrong class
        masks=torch.stack(
            [
                rectangle(0, 0, 10, 10),
                rectangle(0, 0, 10, 9),  # the best-scored of the first object: 90 / 100
                rectangle(20, 20, 30, 25),  # 50 / 100
                rectangle(0, 20, 10, 30),
                rectangle(0, 0, 10, 10),
            ]
        ),
    )
    return found, target


def test_by_hand() -> None:
    metric = MaskQuality()
    metric.update(*([item] for item in scene()))
    result = metric.compute()
    assert float(result["mask_quality"]) == pytest.approx((0.9 + 0.5) / 2, abs=1e-15)
    assert int(result["mask_quality_count"]) == 2
    metric.update([Detections.empty(mask_size=(40, 40))], [scene()[1]])  # what is missed changes nothing
    assert float(metric.compute()["mask_quality"]) == pytest.approx(0.7, abs=1e-15)


def test_nothing_matched_is_not_a_number() -> None:
    found, target = scene()
    metric = MaskQuality()
    metric.update([found[found.scores > 0.94]], [target])
    assert math.isnan(metric.compute()["mask_quality"]) and int(metric.compute()["mask_quality_count"]) == 0


def test_wrong_masks_name_the_image() -> None:
    found, target = scene()
    with pytest.raises(ValueError, match=r"image 3: .*\(20, 40\) and \(40, 40\)"):
        MaskQuality().update([found.__class__(found.boxes, found.scores, found.labels, found.masks[:, :20])], [target])
    with pytest.raises(ValueError, match=r"image 3: .* None and \(40, 40\)"):
        MaskQuality().update([found.__class__(found.boxes, found.scores, found.labels)], [target])
    with pytest.raises(ValueError, match="iou_threshold is 2"):
        MaskQuality(iou_threshold=2)
