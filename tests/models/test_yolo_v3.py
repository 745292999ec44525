from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.models.dense import DenseOutputs
from detseg.models.yolo_v3 import YOLOv3
from detseg.nn import BackboneWithConcat, Darknet53
from detseg.structures import Target
from detseg.targets.priors import PriorGrid

SIZES = [[[8.0, 8], [12, 10]], [[20, 12], [16, 30]]]  # strides 4 and 8


def yolo(num_classes: int = 3) -> YOLOv3:
    body = Darknet53(widths=(4, 4, 6, 8), blocks=(1, 1, 1), strides=(4, 8))
    neck = BackboneWithConcat(backbone=body, depth=1)
    return YOLOv3(num_classes=num_classes, backbone=neck, anchors=PriorGrid(sizes=SIZES)).eval()


def outputs(model: YOLOv3, batch: int = 2) -> DenseOutputs:
    """Random predictions for images of 32 x 48: 8 x 12 and 4 x 6 cells."""
    result = model(torch.zeros(batch, 3, 32, 48))
    for name in ("logits", "regression", "quality"):
        setattr(result, name, torch.randn(getattr(result, name).shape))
    return result


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Target:
    classes = torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64)
    return Target(boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=classes)


TARGETS = [target((1, 1, 20, 13), (30, 2, 46, 31), (40, 20, 47, 28), labels=[1, 2, 0]), target()]
FIRST = 8 * 12 * 2  # priors of the finer scale


def place(n: int) -> tuple[int, int, int, list[float]]:
    """Return stride, row, column and size of prior n."""
    if n < FIRST:
        return 4, n // 24, n // 2 % 12, SIZES[0][n % 2]
    n -= FIRST
    return 8, n // 12, n // 2 % 6, SIZES[1][n % 2]


def prior_box(n: int) -> Tensor:
    stride, row, column, (w, h) = place(n)
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    return torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]])


def test_losses_equal_prior_by_prior() -> None:
    """Sides (19, 12) fit the first prior of the coarse scale, (16, 29) its second, (7, 8) the first of the fine one."""
    model = yolo()
    result = outputs(model)
    assert result.quality is not None
    owners = {FIRST + (0 * 6 + 1) * 2: 0, FIRST + (2 * 6 + 4) * 2 + 1: 1, (6 * 12 + 10) * 2: 2}
    wanted = {"loss_objectness": 0.0, "loss_classification": 0.0, "loss_box": 0.0}
    ignored = 0
    for image, truth in enumerate(TARGETS):
        for n in range(FIRST + 4 * 6 * 2):
            own = owners.get(n) if image == 0 else None
            objectness = result.quality[image, n]
            if own is None:
                if len(truth) and float(box_iou(prior_box(n), truth.boxes).max()) >= 0.5:
                    ignored += 1
                else:
                    wanted["loss_objectness"] += float(F.softplus(objectness))
                continue
            stride, row, column, (w, h) = place(n)
            wanted["loss_objectness"] += float(F.softplus(-objectness))
            classes = F.one_hot(truth.labels[own], 3).float()
            wanted["loss_classification"] += float(
                F.binary_cross_entropy_with_logits(result.logits[image, n], classes, reduction="sum")
            )
            x0, y0, x1, y1 = truth.boxes[own].tolist()
            offset = torch.tensor([(x0 + x1) / 2 / stride - column, (y0 + y1) / 2 / stride - row])
            growth = torch.tensor([(x1 - x0) / w, (y1 - y0) / h]).log()
            numbers = result.regression[image, n]
            wanted["loss_box"] += float(F.binary_cross_entropy_with_logits(numbers[:2], offset, reduction="sum"))
            wanted["loss_box"] += float((numbers[2:] - growth).square().sum())
    found = {name: term.item() for name, term in model.loss(result, TARGETS).items()}
    assert ignored >= 3
    assert found == pytest.approx({name: value / 3 for name, value in wanted.items()}, rel=1e-4)
    share = float(model.diagnostics(result, TARGETS)["ignored_priors"])
    assert share == pytest.approx(ignored / (2 * (FIRST + 48)))


def test_scores_are_objectness_times_each_class() -> None:
    """Classes do not exclude each other: one prior may be two things."""
    model = yolo()
    result = outputs(model, batch=1)
    result.quality = torch.full((1, FIRST + 48), -20.0)
    result.quality[0, 30], result.logits[0, 30] = 2.0, torch.tensor([3.0, -9.0, 1.0])
    (found,) = model.predict(result, torch.tensor([[32, 48]]))
    assert found.labels.tolist() == [0, 2]
    assert_close(found.scores, torch.tensor(2.0).sigmoid() * torch.tensor([3.0, 1.0]).sigmoid())
    assert_close(found.boxes[0], found.boxes[1])


def test_an_untrained_model_finds_nothing_and_counts_positives_per_scale() -> None:
    model = yolo()
    result = model(torch.rand(1, 3, 32, 48))
    assert len(model.predict(result, torch.tensor([[32, 48]]))[0]) == 0  # the objectness starts at 0.01
    figures = model.diagnostics(result, TARGETS[:1])
    assert (float(figures["positives_p2"]), float(figures["positives_p3"])) == (1, 2)


def test_no_objects_two_thousand_and_one_class() -> None:
    model = yolo(1)
    result = model(torch.rand(2, 3, 37, 90))  # no multiple of the strides
    terms = model.loss(result, [target(), target()])
    assert terms["loss_box"].item() == terms["loss_classification"].item() == 0 and terms["loss_objectness"].item() > 0
    low = torch.rand(2000, 2) * 30
    many = Target(boxes=torch.cat([low, low + 0.5], dim=1), labels=torch.zeros(2000, dtype=torch.int64))
    assert all(bool(term.isfinite()) for term in model.loss(result, [many, target()]).values())


def test_crowds_are_no_background() -> None:
    model = yolo()
    result = outputs(model, batch=1)
    boxes = torch.tensor([[1.0, 1, 20, 13], [20, 0, 48, 32]])
    crowd = Target(boxes=boxes, labels=torch.tensor([0, 0]), iscrowd=torch.tensor([False, True]))
    plain = model.assign(result, [target((1, 1, 20, 13))])
    found = model.assign(result, [crowd])
    assert torch.equal(found.rows, plain.rows)
    assert int((found.matched == -2).sum()) > int((plain.matched == -2).sum()) + 20


def test_the_papers_network_is_as_long_as_the_released_file() -> None:
    """yolov3.weights, for COCO's 80 classes, holds 62,001,757 numbers."""
    grid = PriorGrid(sizes=[[[10.0, 13], [16, 30], [33, 23]]] * 3)
    model = YOLOv3(num_classes=80, backbone=BackboneWithConcat(backbone=Darknet53()), anchors=grid)
    state = {key: value for key, value in model.state_dict().items() if "normalize" not in key and "tracked" not in key}
    assert sum(value.numel() for value in state.values()) == 62_001_757
    assert model.backbone.channels == [128, 256, 512]
