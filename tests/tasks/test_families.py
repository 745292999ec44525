"""What each family logs that the others do not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detseg import tasks
from detseg.models.fcn import FCN, FCNHead
from detseg.nn import TinyBackbone
from detseg.structures import Detections, SemanticMap, Target
from fake_models import FakeDetector, FakeRegions, FakeSegmenter, FakeTwoStage, batch, boxes, loader, trainer

NAMES = ["apple", "pear"]
SGD = partial(torch.optim.SGD, lr=0.1)


def square(*corner_and_side: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes and full masks (N, 16, 16) of squares given as x, y, side."""
    masks = torch.zeros(len(corner_and_side), 16, 16, dtype=torch.bool)
    for row, (x, y, side) in enumerate(corner_and_side):
        masks[row, y : y + side, x : x + side] = True
    return boxes(*((x, y, x + side, y + side) for x, y, side in corner_and_side)), masks


def answer(*squares: tuple[int, int, int], masks: bool = False) -> Detections:
    corners, filled = square(*squares)
    count = len(squares)
    return Detections(
        corners, torch.linspace(0.9, 0.5, count), torch.zeros(count, dtype=torch.int64), filled if masks else None
    )


def truth(*squares: tuple[int, int, int], masks: bool = False) -> Target:
    corners, filled = square(*squares)
    labels = torch.zeros(len(squares), dtype=torch.int64)
    return Target(corners, labels, filled if masks else None, image_id=1, size=(16, 16))


def validate(task: tasks.Task, target: Target, tmp_path: Path) -> dict[str, Any]:
    return dict(trainer(tmp_path).validate(task, loader(batch([target])), verbose=False)[0])


def make(kind: type[tasks.Task], model: nn.Module, names: list[str] = NAMES, **more: object) -> tasks.Task:
    return kind(model=model, optimizer=SGD, class_names=names, monitor="val/loss", mode="min", **more)


def test_one_stage_and_anchor_free_are_one_class_with_the_models_diagnostics(tmp_path: Path):
    assert tasks.OneStageDetection is tasks.AnchorFreeDetection is tasks.Detection
    logged = validate(make(tasks.OneStageDetection, FakeDetector()), truth((0, 0, 8), (8, 8, 8)), tmp_path)
    assert logged["val/positives_p3"] == 2 and not [name for name in logged if "proposal" in name]


def test_voc_ap_beside_coco_without_difficult_objects(tmp_path: Path):
    """Two apples, one of them difficult and not found: VOC misses nothing, COCO misses one of two."""
    target = truth((0, 0, 8), (8, 8, 8))
    target.difficult[1] = True
    model = FakeDetector(answer=answer((0, 0, 8)))
    for style in (2007, "2010"):
        task = tasks.Detection(
            model=model, optimizer=SGD, class_names=NAMES, monitor="val/voc_map", mode="max", voc_ap=style
        )
        logged = validate(task, target, tmp_path)
        assert logged["val/voc_map"] == logged["val/voc_map/apple"] == 1
        assert logged["val/map"] == pytest.approx(51 / 101)  # recall 0.5 of 101 levels
        assert task.results["val"]["voc_count"] == 1 and "val/voc_count" not in logged
    with pytest.raises(ValueError, match="'2012'; it must be '2007'"):
        tasks.Detection(model=model, optimizer=SGD, class_names=NAMES, monitor="val/map", voc_ap=2012)
    assert not [name for name in validate(make(tasks.Detection, model), target, tmp_path) if "voc" in name]


def test_two_stage_logs_what_the_proposals_cover(tmp_path: Path):
    model = FakeTwoStage(answer=answer((0, 0, 8)))
    logged = validate(make(tasks.TwoStageDetection, model), truth((0, 0, 8), (8, 8, 8)), tmp_path)
    limits = (100, 300, 1000, 2000)
    assert [logged[f"val/proposal_ar_{limit}"] for limit in limits] == [0.5] * 4
    assert [logged[f"val/proposal_recall_50_{limit}"] for limit in limits] == [0.5] * 4


def test_two_stage_needs_proposals():
    with pytest.raises(TypeError, match="FakeDetector has no proposals"):
        make(tasks.TwoStageDetection, FakeDetector())


@pytest.mark.parametrize("kind", [FakeDetector, FakeTwoStage])
def test_instance_logs_masks_beside_boxes(kind: type[FakeDetector], tmp_path: Path):
    """The box is exact, its mask covers half: IoU 0.5 counts at one of ten thresholds."""
    found = answer((0, 0, 8), masks=True)
    assert found.masks is not None
    found.masks[0, 4:] = False
    task = make(tasks.InstanceSegmentation, kind(answer=found))
    logged = validate(task, truth((0, 0, 8), masks=True), tmp_path)
    assert logged["val/map"] == 1 and logged["val/mask_map_50"] == 1
    assert logged["val/mask_map"] == pytest.approx(0.1) and logged["val/mask_map/apple"] == pytest.approx(0.1)
    assert logged["val/mask_quality"] == pytest.approx(0.5)
    assert ("val/proposal_ar_100" in logged) == (kind is FakeTwoStage)


def test_semantic_logs_iou_per_class(tmp_path: Path):
    """All pixels are called pear; three quarters are, one quarter is apple, and there is no plum."""
    labels = torch.ones(16, 16, dtype=torch.int64)
    labels[:8, :8] = 0
    target = Target(boxes(), torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels), image_id=1, size=(16, 16))
    task = make(tasks.SemanticSegmentation, FakeSegmenter(), ["apple", "pear", "plum"])
    logged = validate(task, target, tmp_path)
    assert logged["val/iou/pear"] == pytest.approx(0.75) and logged["val/iou/apple"] == 0
    assert logged["val/dice/pear"] == pytest.approx(2 * 0.75 / 1.75)  # Dice = 2 IoU / (1 + IoU)
    assert "val/iou/plum" not in logged and logged["val/miou"] == pytest.approx(0.375)
    assert logged["val/pixel_accuracy"] == pytest.approx(0.75)
    assert "val/boundary_iou" not in logged


def test_semantic_logs_borders_where_they_are_asked_for(tmp_path: Path):
    """The border between pear and apple is not seen at all."""
    labels = torch.ones(16, 16, dtype=torch.int64)
    labels[:8, :8] = 0
    target = Target(boxes(), torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels), image_id=1, size=(16, 16))
    task = make(tasks.SemanticSegmentation, FakeSegmenter(), ["apple", "pear", "plum"], boundary=True)
    logged = validate(task, target, tmp_path)
    assert logged["val/boundary_iou"] == 0 and logged["val/boundary_f/pear"] == 0
    assert "val/boundary_f/plum" not in logged and logged["val/miou"] == pytest.approx(0.375)


@pytest.mark.parametrize("empty", [False, True], ids=["some", "none"])
def test_proposals_of_a_batch_reach_the_model_in_every_step(empty: bool, tmp_path: Path):
    """Two of the three given are the objects; an image without any is one as any other."""
    given = [boxes() if empty else boxes((0, 0, 8, 8), (8, 8, 16, 16), (0, 8, 4, 12))]
    model = FakeRegions()
    task = make(tasks.TwoStageDetection, model)
    seen = replace(batch([truth((0, 0, 8), (8, 8, 8))]), proposals=given)
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(task, loader(seen), loader(seen))
    assert [proposals[0].tolist() for proposals in model.given] == [given[0].tolist()] * 2
    assert task.results["val"]["proposal_ar_100"] == (0 if empty else 1)
    runner.predict(task, loader(seen))
    assert len(model.given) == 3 and model.given[2][0].tolist() == given[0].tolist()


def test_a_model_without_proposals_is_given_none(tmp_path: Path):
    """It has no such argument: giving it one would be an error."""
    runner = trainer(tmp_path, max_epochs=1)
    seen = batch([truth((0, 0, 8))])
    runner.fit(make(tasks.Detection, FakeDetector()), loader(seen), loader(seen))
    assert runner.global_step == 1


def test_an_auxiliary_head_is_learnt_and_logged_but_not_asked(tmp_path: Path):
    body = TinyBackbone(widths=(8, 8), stem=8)
    model = FCN(num_classes=3, backbone=body, auxiliary=FCNHead, auxiliary_weight=0.25)
    labels = torch.zeros(16, 16, dtype=torch.int64)
    labels[:, 8:] = 1
    target = Target(boxes(), torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels), image_id=1, size=(16, 16))
    task = make(tasks.SemanticSegmentation, model, ["apple", "pear", "plum"])
    nn.init.constant_(model.aux_classifier[4].weight, 0.0)
    nn.init.constant_(model.aux_classifier[4].bias, 0.0)
    logged = validate(task, target, tmp_path)
    third = math.log(3)  # both heads hold three classes for equally likely
    assert logged["val/loss_cross_entropy"] == pytest.approx(third, rel=1e-5)
    assert logged["val/loss_auxiliary_cross_entropy"] == pytest.approx(0.25 * third, rel=1e-5)
    assert logged["val/loss"] == pytest.approx(1.25 * third, rel=1e-5)
    assert "val/miou" in logged
