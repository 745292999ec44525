from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.models.dense import DenseOutputs
from detseg.models.yolo_v2 import YOLOv2
from detseg.nn import BackboneWithPassthrough, Darknet19
from detseg.structures import Target
from detseg.targets.priors import PriorGrid

SIZES = [[8.0, 8], [20, 12], [16, 30]]


def yolo(num_classes: int = 3, **arguments: float) -> YOLOv2:
    body = Darknet19(widths=(4, 4, 6, 8), depths=(1, 1, 1, 1), strides=(4, 8))
    neck = BackboneWithPassthrough(backbone=body, width=8)
    return YOLOv2(num_classes=num_classes, backbone=neck, anchors=PriorGrid(sizes=[SIZES]), **arguments).eval()


def outputs(model: YOLOv2, batch: int = 2, spread: float = 1.0) -> DenseOutputs:
    """Random predictions for images of 32 x 48: 4 x 6 cells."""
    result = model(torch.zeros(batch, 3, 32, 48))
    for name in ("logits", "regression", "quality"):
        setattr(result, name, torch.randn(getattr(result, name).shape) * spread)
    return result


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Target:
    classes = torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64)
    return Target(boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=classes)


TARGETS = [
    target((1, 1, 20, 12), (30, 2, 46, 31), (2, 2, 21, 13.5), labels=[1, 2, 0]),  # the first and third want one prior
    target(),
]


def box_of(numbers: Tensor, row: int, column: int, size: list[float]) -> Tensor:
    x, y = (column + numbers[0].sigmoid()) * 8, (row + numbers[1].sigmoid()) * 8
    w, h = size[0] * numbers[2].exp(), size[1] * numbers[3].exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def slow_loss(model: YOLOv2, result: DenseOutputs, targets: list[Target]) -> dict[str, float]:
    """Prior by prior; what each object learns is looked up by hand below."""
    owners = {(0, (0 * 6 + 1) * 3 + 1): 2, (0, (2 * 6 + 4) * 3 + 2): 1}  # cell (0, 1), prior 1; cell (2, 4), prior 2
    terms = {"loss_objectness": 0.0, "loss_classification": 0.0, "loss_box": 0.0}
    assert result.quality is not None
    for image, truth in enumerate(targets):
        for n in range(72):
            row, column, prior = n // 18, n // 3 % 6, n % 3
            box = box_of(result.regression[image, n], row, column, SIZES[prior])[None]
            objectness = float(result.quality[image, n].sigmoid())
            own = owners.get((image, n))
            if own is None:
                covered = len(truth) > 0 and float(box_iou(box, truth.boxes).max()) > model.ignore
                terms["loss_objectness"] += 0.0 if covered else model.empty_weight * objectness**2
                continue
            iou = float(box_iou(box, truth.boxes[own : own + 1]))
            terms["loss_objectness"] += model.object_weight * (objectness - iou) ** 2
            terms["loss_classification"] += float(F.cross_entropy(result.logits[image, n], truth.labels[own]))
            x0, y0, x1, y1 = truth.boxes[own].tolist()
            wanted = torch.tensor([(x0 + x1) / 16 - column, (y0 + y1) / 16 - row, (x1 - x0) / SIZES[prior][0], 1.0])
            wanted[3] = (y1 - y0) / SIZES[prior][1]
            found = result.regression[image, n]
            terms["loss_box"] += float((found[:2].sigmoid() - wanted[:2]).square().sum())
            terms["loss_box"] += float((found[2:] - wanted[2:].log()).square().sum())
    return {name: value / len(owners) for name, value in terms.items()}


def test_losses_equal_prior_by_prior() -> None:
    model = yolo()
    result = outputs(model)
    result.regression[0, 3 * 7 + 1] = torch.tensor([0.0, -9.0, 0.0, 0.0])  # covers the first box, learns none
    covered = box_of(result.regression[0, 22], 1, 1, SIZES[1])[None]
    assert float(box_iou(covered, TARGETS[0].boxes[:1])) > 0.6
    found = {name: term.item() for name, term in model.loss(result, TARGETS).items()}
    wanted = slow_loss(model, result, TARGETS)
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_factors_multiply_their_terms() -> None:
    model, twice = yolo(), yolo(box_weight=2.0, class_weight=3.0)
    result = outputs(model)
    once, found = model.loss(result, TARGETS), twice.loss(result, TARGETS)
    assert_close(found["loss_box"], 2 * once["loss_box"])
    assert_close(found["loss_classification"], 3 * once["loss_classification"])


def test_scores_are_objectness_times_softmax() -> None:
    model = yolo(score_threshold=0.1)
    result = outputs(model, batch=1)
    result.quality = torch.full((1, 72), -20.0)
    result.quality[0, 25], result.logits[0, 25] = 1.0, torch.tensor([0.0, 2.0, 0.0])
    (found,) = model.predict(result, torch.tensor([[32, 48]]))
    expected = torch.tensor(1.0).sigmoid() * torch.tensor([0.0, 2.0, 0.0]).softmax(0)
    assert found.labels.tolist() == [1]
    assert_close(found.scores, expected[1:2])
    assert_close(
        found.boxes[0],
        box_of(result.regression[0, 25], 1, 2, SIZES[1]).clamp(min=0).minimum(torch.tensor([48.0, 32, 48, 32])),
    )


def test_the_objectness_that_is_learnt_is_the_iou() -> None:
    """Where the prediction is exact, an objectness of one costs nothing."""
    model = yolo()
    result = outputs(model, batch=1)
    truth = target((10, 9, 18, 17))  # centre (14, 13): cell (1, 1), sides of the first prior
    prior = 3 * 7
    result.regression[0, prior] = torch.tensor([torch.tensor(0.75).logit(), torch.tensor(0.625).logit(), 0, 0])
    result.quality = torch.full((1, 72), -30.0)
    result.quality[0, prior] = 30.0
    assert model.loss(result, [truth])["loss_objectness"].item() < 1e-6
    result.quality[0, prior] = -30.0
    assert_close(model.loss(result, [truth])["loss_objectness"].item(), 5.0)


def test_no_objects_two_thousand_and_one_class() -> None:
    model = yolo(1)
    result = model(torch.rand(2, 3, 37, 90))  # no multiple of the stride
    terms = model.loss(result, [target(), target()])
    assert terms["loss_box"].item() == terms["loss_classification"].item() == 0 and terms["loss_objectness"].item() > 0
    low = torch.rand(2000, 2) * 30
    many = Target(boxes=torch.cat([low, low + 0.5], dim=1), labels=torch.zeros(2000, dtype=torch.int64))
    assert all(bool(term.isfinite()) for term in model.loss(result, [many, target()]).values())
    assert len(model.predict(result, torch.tensor([[37, 90], [30, 90]]))) == 2


def test_the_papers_network_is_as_long_as_the_released_file() -> None:
    """yolov2.weights, for COCO's 80 classes and with the passthrough of 64 channels, holds 50,983,561 numbers."""
    coco = PriorGrid(sizes=[[[18.0, 22], [60, 66], [107, 175], [252, 113], [313, 293]]])
    model = YOLOv2(num_classes=80, backbone=BackboneWithPassthrough(backbone=Darknet19(), reduce=64), anchors=coco)
    state = {key: value for key, value in model.state_dict().items() if "normalize" not in key and "tracked" not in key}
    assert sum(value.numel() for value in state.values()) == 50_983_561
