from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import box_iou, complete_box_iou

from detseg.config import instantiate, load_config
from detseg.models.dense import DenseOutputs
from detseg.models.fcos import FCOS
from detseg.models.yolo import YOLO, YOLOHead
from detseg.nn import BackboneWithPAN, TinyBackbone
from detseg.structures import Target
from detseg.targets.points import CellGrid, DistanceCoder

BINS = 16


def _model(num_classes: int = 2, **arguments: Any) -> YOLO:
    body = TinyBackbone(widths=(16, 16, 16), strides=(8, 16))
    backbone = BackboneWithPAN(backbone=body, channels=[16, 24], width=1.0)
    return YOLO(num_classes=num_classes, backbone=backbone, **arguments).eval()


def _target(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Target:
    return Target(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        iscrowd=None if crowd is None else torch.tensor(crowd),
    )


def _two_hot(codes: Tensor) -> Tensor:
    """Return logits (..., 4 * 16) whose expectation is ``codes`` (..., 4) in [0, 15]."""
    distance = (codes[..., None] - torch.arange(BINS)).abs()
    return (1 - distance).clamp(min=1e-30).log().flatten(-2)


def _outputs(model: YOLO, boxes: Tensor, cells: list[int], labels: list[int], sure: Tensor) -> DenseOutputs:
    """Outputs for one image of 64 x 64 in which some cells have a box each, with the logits ``sure`` of its class."""
    outputs = model(torch.zeros(1, 3, 64, 64))
    logits = torch.full_like(outputs.logits, -20.0)
    regression = torch.zeros_like(outputs.regression)
    logits[0, cells, labels] = sure
    codes = model.coder.encode(boxes, outputs.lattice.boxes[cells])
    regression[0, cells] = _two_hot(codes)
    return replace(outputs, logits=logits, regression=regression, quality=None)


@pytest.mark.parametrize(
    ("size", "millions"), [("n", 2.6), ("s", 9.4), ("m", 20.1), ("l", 25.3), ("x", 56.9)], ids=lambda value: str(value)
)
def test_the_sizes_have_the_parameters_that_are_published(size: str, millions: float) -> None:
    cfg = load_config("model=yolo", f"backbone@model.backbone=yolo_{size}")
    cfg.data.num_classes = 80
    with torch.device("meta"):
        model: Any = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model")
    assert_close(sum(value.numel() for value in model.parameters()) / 1e6, millions, rtol=0.02, atol=0.0)
    assert model.backbone.strides == [8, 16, 32]


def test_distances_are_coded_from_the_centre_of_the_cell_and_back() -> None:
    grid = torch.cat(CellGrid()([(3, 4), (2, 2)], [(8, 8), (16, 16)], "cpu"))
    assert grid[5].tolist() == [8.0, 8.0, 16.0, 16.0] and grid[12].tolist() == [0.0, 0.0, 16.0, 16.0]
    centre, stride = (grid[:, :2] + grid[:, 2:]) / 2, grid[:, 2:3] - grid[:, :1]
    codes = torch.rand(16, 4) * 15
    boxes = torch.cat((centre - codes[:, :2] * stride, centre + codes[:, 2:] * stride), 1)
    coder, model = DistanceCoder(normalize=True), _model()
    assert_close(coder.encode(boxes, grid), codes, rtol=1e-4, atol=1e-4)
    assert_close(model.codes(_two_hot(codes)), codes)
    assert_close(coder.decode(model.codes(_two_hot(coder.encode(boxes, grid))), grid), boxes, rtol=1e-4, atol=1e-3)


def test_sure_cells_are_predicted_with_their_boxes() -> None:
    model = _model()
    boxes = torch.tensor([[4.0, 6, 30, 28], [20.0, 10, 60, 62]])
    sure = torch.tensor([5.0, 4.0])
    found = model.predict(_outputs(model, boxes, [9, 8 * 8 + 5], [1, 0], sure), torch.tensor([[64, 50]]))[0]
    assert_close(found.boxes, torch.tensor([[4.0, 6, 30, 28], [20.0, 10, 50, 62]]))  # cut to the valid width
    assert_close(found.scores, sure.sigmoid())
    assert found.labels.tolist() == [1, 0]


def test_the_losses_by_hand() -> None:
    """Two cells predict one object: one exactly, one an eighth too narrow."""
    model = _model()
    truth = torch.tensor([[8.0, 8, 24, 24]])
    guesses = torch.tensor([[8.0, 8, 24, 24], [8.0, 8, 22, 24]])
    outputs = _outputs(model, guesses, [9, 10], [1, 1], torch.tensor([5.0, 5.0]))
    target = _target(truth.tolist(), [1])
    assignment = model.assign(outputs, [target])
    quality = box_iou(truth, guesses)[0] ** 6  # both score alike, and the best has IoU 1
    # Two more cells lie inside, whose boxes are far too large: they learn it with a weight of nearly nothing.
    assert (assignment.matched[0] == 0).nonzero()[:, 0].tolist() == [9, 10, 17, 18]
    assert_close(assignment.quality, torch.tensor([*quality.tolist(), 0.0, 0.0]), rtol=1e-4, atol=1e-6)
    terms, total = model.loss(outputs, [target]), float(quality.sum())
    entries = F.binary_cross_entropy_with_logits(outputs.logits, torch.zeros_like(outputs.logits), reduction="sum")
    wanted = (entries - 5.0 * quality.sum()) / total
    assert_close(terms["loss_classification"], 0.5 * wanted, rtol=1e-4, atol=1e-5)
    boxes = ((1 - complete_box_iou(truth, guesses)[0]) * quality).sum() / total
    assert_close(terms["loss_box"], 7.5 * boxes, rtol=1e-3, atol=1e-4)
    # Whole strides are certain, halves are even: of the first cell (12, 12) all sides lie half a stride or one and a
    # half away, of the second (20, 12) three do and the right one is predicted at 1/4, where 1/2 is true.
    right = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    sides = [math.log(2.0), (3 * math.log(2.0) + right) / 4]
    spread = sum(side * float(weight) for side, weight in zip(sides, quality, strict=True)) / total
    assert_close(terms["loss_distribution"].item(), 1.5 * spread, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("kind", ["none", "tiny", "many", "crowd"])
def test_hard_batches_have_finite_losses_and_gradients(kind: str, num_classes: int) -> None:
    model = _model(num_classes)
    images = torch.rand(2, 3, 45, 70)  # no multiple of a stride
    none = _target([], [])
    corner = torch.rand(2000, 2) * 40
    many = torch.cat((corner, corner + 2 + torch.rand(2000, 2) * 25), 1)
    other = {
        "none": none,
        "tiny": _target([[9.0, 9, 11, 11], [3.5, 3.5, 4.5, 4.5]], [0, 0]),
        "many": _target(many.tolist(), [0] * 2000),
        "crowd": _target([[4.0, 4, 30, 30], [20.0, 20, 60, 44]], [0, 0], [False, True]),
    }[kind]
    terms = model.loss(model(images), [none, other])
    assert all(math.isfinite(float(term.detach())) for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    gradients = [value.grad for value in model.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    positives = model.assign(model(images), [none, other]).rows
    assert (len(positives) > 0) == (kind != "none")
    found = model.predict(model(images), torch.tensor([[45, 70], [45, 70]]))
    assert len(found) == 2 and all(len(one) <= 100 for one in found)


def test_assignment_in_a_batch_is_that_of_each_image_alone() -> None:
    model = _model()
    images = torch.rand(3, 3, 64, 64)
    targets = [
        _target([[4.0, 4, 30, 30], [20, 20, 60, 60]], [0, 1]),
        _target([], []),
        _target([[2.0, 30, 50, 60]], [1]),
    ]
    together = model.assign(model(images), targets)
    for index, target in enumerate(targets):
        alone = model.assign(model(images[index : index + 1]), [target])
        matched = together.matched[index]
        shift = sum(len(before) for before in targets[:index])
        assert_close(torch.where(matched >= 0, matched - shift, matched), alone.matched[0])
    assert together.quality is not None and float(together.quality.max()) <= 1.0


def test_fcos_takes_the_neck_too() -> None:
    body = TinyBackbone(widths=(8, 8, 16), strides=(8, 16))
    neck = BackboneWithPAN(backbone=body, channels=16, width=1.0)
    model = FCOS(num_classes=2, backbone=neck, head_depth=1, head_groups=4)
    terms = model.loss(model(torch.rand(1, 3, 64, 64)), [_target([[4.0, 4, 40, 40]], [0])])
    assert all(math.isfinite(float(term.detach())) and float(term.detach()) > 0 for term in terms.values())


def test_the_head_has_the_published_widths_or_its_own() -> None:
    head = YOLOHead(channels=[64, 128], num_classes=80, bins=16)
    assert [branch[0][0].out_channels for branch in head.box_branches] == [64, 64]
    assert [branch[1][0].out_channels for branch in head.class_branches] == [80, 80]
    own = YOLOHead(channels=[64], num_classes=3, bins=8, box_width=24, class_width=40)
    logits, regression, quality = own([torch.rand(2, 64, 3, 5)])
    assert logits.shape == (2, 15, 3) and regression.shape == (2, 15, 32) and quality is None
    assert_close(logits.sigmoid().mean().item(), 0.01, rtol=0.5, atol=0)  # nothing is sure before training


def test_diagnostics_name_positives_and_their_quality() -> None:
    model = _model()
    truth = torch.tensor([[8.0, 8, 24, 24]])
    outputs = _outputs(model, truth, [9], [1], torch.tensor([5.0]))
    found = model.diagnostics(outputs, [_target(truth.tolist(), [1])])
    assert float(found["positives_p3"]) >= 1 and 0 < float(found["positive_quality"]) <= 1
    none = model.diagnostics(outputs, [_target([], [])])
    assert float(none["positives_p3"]) == float(none["positive_quality"]) == 0.0
