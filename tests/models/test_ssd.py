from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.detection import ssd300_vgg16

from detseg.config import instantiate, load_config
from detseg.models.dense import DenseOutputs
from detseg.models.ssd import SSD, SSDHead
from detseg.nn import AtrousVGG16, Backbone, BackboneWithExtras, CheckpointMismatch, TinyBackbone
from detseg.structures import Target
from detseg.targets.default_boxes import DefaultBoxes
from detseg.targets.lattice import build_lattice
from detseg.targets.samplers import HardNegativeMining
from ssd_oracle import Given, liven, objects, torchvision_losses, torchvision_outputs

EXTRA = [[512, 3, 2, 1], [256, 3, 2, 1], [256, 3, 1, 0], [256, 3, 1, 0]]
SIZES = torch.tensor([[300, 300]] * 2)


def ssd300(num_classes: int, weights: object = None) -> SSD:
    backbone = BackboneWithExtras(backbone=AtrousVGG16(), extra=EXTRA, l2_scale=20.0)
    return SSD(num_classes=num_classes, backbone=backbone, weights=weights)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> tuple[nn.Module, SSD, DenseOutputs]:
    """Both models, and what ours says about the images; the body of theirs runs no more."""
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)
    theirs.transform.resize = lambda image, target: (image, target)  # sizes belong to the data
    theirs.backbone.scale_weight.data.uniform_(10, 30)
    levels = liven(theirs.eval(), images)
    path = tmp_path_factory.mktemp("weights") / "ssd300.pth"
    torch.save(theirs.state_dict(), path)
    theirs.backbone, ours = Given(levels), ssd300(3, path).eval()
    with torch.no_grad():
        return theirs, ours, ours(images, SIZES)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Whole images of 300 pixels, in the range that the unscaled mean and standard deviation are made for."""
    return torch.rand((2, 3, 300, 300), generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@torch.no_grad()
def test_outputs_and_predictions_equal_torchvisions(twins: tuple[nn.Module, SSD, DenseOutputs], images: Tensor) -> None:
    theirs, ours, outputs = twins
    logits, deltas = torchvision_outputs(theirs, images)
    assert logits.shape == (2, 8732, 4)
    assert float(logits.std()) > 1.0
    assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-4)
    assert_close(outputs.regression, deltas, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(ours.predict(outputs, SIZES), theirs(list(images)), strict=True):
        assert len(found) > 50
        assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-2)
        assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
        assert_close(found.labels, wanted["labels"] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("empty", [None, 1])
@torch.no_grad()
def test_losses_equal_torchvisions(
    twins: tuple[nn.Module, SSD, DenseOutputs], images: Tensor, empty: int | None
) -> None:
    theirs, ours, outputs = twins
    targets = objects(2, 300, empty=empty)
    found = ours.loss(outputs, targets)
    wanted = torchvision_losses(theirs, images, targets)
    assert found.keys() == wanted.keys() and min(wanted.values()) > 0.1
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_published_weights_bring_their_mean_and_pick_real_classes(tmp_path) -> None:
    with torch.device("meta"):
        shapes = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).state_dict()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in shapes.items()}
    first = "head.classification_head.module_list.0"
    state[f"{first}.bias"] = torch.arange(91.0).repeat(4)
    torch.save(
        {name: value.clone() if name.startswith(first) else value for name, value in state.items()}, tmp_path / "a.pth"
    )
    ours = ssd300(80, tmp_path / "a.pth")
    bias = ours.head.classification_head.module_list[0].bias.view(4, 81)
    assert bias[0, :14].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]  # COCO has no category 12
    assert bias[3, 80] == 90
    assert_close(ours.normalize.std, torch.full((3,), 1 / 255))
    assert_close(ours.normalize.mean, torch.tensor([0.48235, 0.45882, 0.40784]))
    with pytest.raises(CheckpointMismatch, match=r"91 classes \(background included\), the model 5"):
        ssd300(5, tmp_path / "a.pth")


class Maps(Backbone):
    """Two maps of the size that a body would give."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.channels, self.strides = [2, 2], strides

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images.new_zeros(1, 2, *(-(-side // stride) for side in images.shape[2:])) for stride in self.strides]


@pytest.mark.parametrize(
    ("name", "size", "total", "cells"),
    [
        ("ssd300", 300, 8732, [38, 19, 10, 5, 3, 1]),
        ("ssd512", 512, 24564, [64, 32, 16, 8, 4, 2, 1]),
        ("ssdlite", 320, 3234, [20, 10, 5, 3, 2, 1]),
    ],
)
def test_the_configs_lay_the_papers_default_boxes(name: str, size: int, total: int, cells: list[int]) -> None:
    section = OmegaConf.to_container(load_config(f"model={name}").model)
    extra, kind = section["backbone"]["extra"], section["backbone"]["kind"]
    body = Maps([16, 32] if name == "ssdlite" else [8, 16])
    levels = BackboneWithExtras(backbone=body, extra=[[2, *row[1:]] for row in extra], kind=kind).eval()
    found = tuple(tuple(level.shape[2:]) for level in levels(torch.zeros(1, 3, size, size)))
    assert found == tuple((count, count) for count in cells)
    boxes = instantiate(section["default_boxes"], path="default_boxes")
    lattice = build_lattice(boxes, found, tuple(boxes.strides((size, size), found, [8] * len(found))), "cpu")
    assert lattice.total == total
    middles = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2
    assert float(middles.amin()) > 0 and float(middles.amax()) < size + 8


def small(num_classes: int = 2, least: int = 0, **arguments) -> SSD:
    body = TinyBackbone(widths=(16, 16), strides=(4, 8))
    return SSD(
        num_classes=num_classes,
        backbone=BackboneWithExtras(backbone=body, extra=[[16, 3, 2, 1]], kind="batch"),
        default_boxes=DefaultBoxes(image_size=64, scales=[0.15, 0.3, 0.6, 0.9], ratios=[[2]] * 3),
        mining=HardNegativeMining(ratio=3.0, least=least),
        **arguments,
    ).eval()


def target(*boxes: list[float], labels: list[int] | None = None, crowd: list[bool] | None = None) -> Target:
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        iscrowd=None if crowd is None else torch.tensor(crowd),
    )


def slow_losses(model: SSD, outputs, targets: list[Target]) -> tuple[float, float]:
    """Equations 1 to 3, default box by default box."""
    lattice, assignment = outputs.lattice, model.assign(outputs, targets)
    confidence = location = 0.0
    for image, goal in enumerate(targets):
        costs, wanted = [], 0
        for row in range(lattice.total):
            probability = outputs.logits[image, row].softmax(0)
            match = int(assignment.matched[image, row]) - sum(len(before) for before in targets[:image])
            if assignment.matched[image, row] < 0:
                costs.append(-float(probability[0].log()))
                continue
            wanted += 3
            confidence -= float(probability[1 + goal.labels[match]].log())
            x0, y0, x1, y1 = lattice.boxes[row].tolist()
            u0, v0, u1, v1 = goal.boxes[match].tolist()
            scaled = torch.tensor([(u0 + u1 - x0 - x1) / 2 / (x1 - x0), (v0 + v1 - y0 - y1) / 2 / (y1 - y0)]) * 10
            grown = torch.tensor([(u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)]).log() * 5
            gap = (outputs.regression[image, row] - torch.cat([scaled, grown])).abs()
            location += float(torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum())
        confidence += sum(sorted(costs, reverse=True)[:wanted])
    count = int((assignment.matched >= 0).sum())
    return confidence / count, location / count


@torch.no_grad()
def test_losses_are_those_of_a_slow_twin() -> None:
    torch.manual_seed(1)
    model = small()
    targets = [target([4, 4, 30, 30], [20, 30, 50, 60], labels=[1, 0]), target()]
    outputs = model(torch.rand(2, 3, 64, 64))
    found = model.loss(outputs, targets)
    confidence, location = slow_losses(model, outputs, targets)
    assert_close(float(found["loss_classification"]), confidence, rtol=1e-4, atol=0)
    assert_close(float(found["loss_box"]), location, rtol=1e-4, atol=0)
    assert_close(float(small(box_weight=0.5).loss(outputs, targets)["loss_box"]), location / 2, rtol=1e-4, atol=0)


def test_images_without_objects_teach_nothing_or_some_background() -> None:
    images = torch.rand(2, 3, 64, 64)
    for least in (0, 4):
        model = small(least=least)
        terms = model.loss(model(images), [target(), target()])
        assert terms["loss_box"].item() == 0.0
        assert (terms["loss_classification"].item() == 0.0) == (least == 0)
        (terms["loss_classification"] + terms["loss_box"]).backward()
        assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in model.parameters())


@torch.no_grad()
def test_default_boxes_in_crowds_are_neither_objects_nor_background() -> None:
    model = small(least=10**6)  # all background is mined
    goal = target([4, 4, 20, 20], [32, 32, 64, 64], crowd=[False, True])
    outputs = model(torch.rand(1, 3, 64, 64))
    before = model.loss(outputs, [goal])["loss_classification"]
    ignored = model.assign(outputs, [goal]).matched == -2
    assert int(ignored.sum()) > 8
    outputs.logits[..., 1] += 9.0 * ignored
    assert_close(model.loss(outputs, [goal])["loss_classification"], before)


@torch.no_grad()
def test_predictions_by_hand() -> None:
    model = small(num_classes=2, score_threshold=0.2, top_k=2)
    outputs = model(torch.rand(1, 3, 64, 64))
    outputs.logits = torch.full_like(outputs.logits, -9.0)
    outputs.logits[..., 0] = 9.0
    outputs.regression = torch.zeros_like(outputs.regression)
    lattice = outputs.lattice
    for row, scores in [
        (300, [0.1, 0.6, 0.3]),
        (700, [0.5, 0.5, 0.0]),
        (900, [0.2, 0.8, 0.0]),
        (1100, [0.81, 0.19, 0.0]),
    ]:
        outputs.logits[0, row] = torch.tensor(scores).clamp(min=1e-6).log()
    (found,) = model.predict(outputs, torch.tensor([[64, 60]]))
    assert found.labels.tolist() == [0, 0, 1]  # two of class 0 by top_k; row 300 has two classes; 0.19 is below
    assert_close(found.scores, torch.tensor([0.8, 0.6, 0.3]), rtol=0, atol=1e-4)
    corners = lattice.boxes[[900, 300, 300]]
    assert_close(found.boxes, corners.clamp(min=0).minimum(torch.tensor([60.0, 64, 60, 64])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("size", [(50, 75), (8, 8), (130, 64)])
def test_any_size_and_number_of_objects_gives_finite_losses_and_predictions(
    classes: int, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    model = small(num_classes=classes)
    corner = torch.rand((2000, 2), generator=generator) * torch.tensor([size[1], size[0]]) * 0.9
    boxes = torch.cat([corner, corner + torch.rand((2000, 2), generator=generator) * 9], dim=1)
    crowded = Target(boxes=boxes, labels=torch.randint(0, classes, (2000,), generator=generator))
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, *size))
    terms = model.loss(outputs, [crowded, target()])
    assert all(bool(term.isfinite()) for term in terms.values()) and float(terms["loss_box"]) > 0
    for found in model.predict(outputs, torch.tensor([size, size])):
        assert bool((found.labels < classes).all()) and len(found) <= 200
        assert bool((found.boxes <= torch.tensor([size[1], size[0]] * 2)).all())


@torch.no_grad()
def test_diagnostics_count_positives_and_mined_background() -> None:
    model = small()
    outputs = model(torch.rand(2, 3, 64, 64))
    targets = [target([4, 4, 16, 16], [30, 20, 62, 60]), target()]
    found = model.diagnostics(outputs, targets)
    total = sum(float(found[f"positives_level_{level}"]) for level in (1, 2, 3))
    assert total == len(model.assign(outputs, targets).rows) > 1
    assert 0.0 < float(found["mined_share"]) < 1.0
    assert float(model.diagnostics(outputs, [target(), target()])["mined_share"]) == 0.0


def test_half_precision_is_summed_in_single() -> None:
    model = small().to(torch.bfloat16)
    outputs = model(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    terms = model.loss(outputs, [target([4, 4, 30, 30])])
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert model.predict(outputs, torch.tensor([[64, 64]]))[0].scores.dtype == torch.float32


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"for 6 levels, but the backbone has 2, of \[16, 16\] channels"):
        SSD(num_classes=2, backbone=TinyBackbone(widths=(16, 16)))
    with pytest.raises(ValueError, match=r"box_weight is -1\.0"):
        small(box_weight=-1.0)
    with pytest.raises(ValueError, match="shorter"):
        SSDHead(channels=[4, 4], anchors=[2], num_classes=3)
