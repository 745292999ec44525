from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from detseg.losses import heatmap_focal_loss
from detseg.models.cornernet import CORNERS, CornerNet, Corners
from detseg.models.heatmap import HeatmapOutputs
from detseg.nn import TinyBackbone
from detseg.nn.hourglass import StackedHourglass
from detseg.structures import Target
from heatmap_oracle import ideal_logits, in_order, scattered, sure, target, write_cells

STRIDE = 4


def _model(classes: int = 3, **options: object) -> CornerNet:
    backbone = TinyBackbone(widths=(8,), stem=8)
    return CornerNet(num_classes=classes, backbone=backbone, pool_width=8, **options)


def _blank(size: tuple[int, int], batch: int, classes: int = 3) -> HeatmapOutputs:
    shape = -(-size[0] // STRIDE), -(-size[1] // STRIDE)
    channels = {"heat": classes, "tag": 1, "offset": 2}
    maps = {
        f"{corner}_{name}": torch.zeros(batch, count, *shape)
        for corner, (name, count) in itertools.product(CORNERS, channels.items())
    }
    return HeatmapOutputs([maps], STRIDE, size)


def _ideal(model: CornerNet, targets: list[Target], size: tuple[int, int]) -> HeatmapOutputs:
    """Return outputs that say the truth where it is asked for; each object of an image has a tag of its own."""
    outputs = _blank(size, len(targets), model.num_classes)
    truth = model.truth(outputs, targets)
    shape = len(targets), -(-size[0] // STRIDE), -(-size[1] // STRIDE)
    tags = torch.arange(len(truth.image)).float()[:, None] * 2
    for corner, wanted in truth.corners.items():
        place = truth.image, wanted.cells
        outputs.stacks[0] |= {
            f"{corner}_heat": ideal_logits(wanted.heat),
            f"{corner}_offset": write_cells((shape[0], 2, *shape[1:]), *place, wanted.offsets),
            f"{corner}_tag": write_cells((shape[0], 1, *shape[1:]), *place, tags),
        }
    return outputs


@pytest.mark.parametrize("size", [(128, 128), (126, 93)])
def test_planted_objects_are_recovered_from_ideal_maps(size: tuple[int, int]) -> None:
    model, sizes = _model(), torch.tensor([size] * 3)
    targets = [scattered(15, size, 3, 1), target([], []), scattered(6, size, 3, 2)]
    outputs = _ideal(model, targets, size)
    for found, wanted in zip(model.predict(outputs, sizes), targets, strict=True):
        kept = sure(found, 0.3)  # Soft-NMS lowers what overlaps, and keeps it
        assert_close(in_order(kept.boxes, kept.labels), in_order(wanted.boxes, wanted.labels), rtol=1e-5, atol=1e-4)
    terms = model.loss(outputs, targets)
    for name in ("loss_offset", "loss_pull", "loss_push"):
        assert_close(terms[name].item(), 0.0, atol=1e-6, rtol=0)
    assert float(model.diagnostics(outputs, targets)["grouped_corners"]) == 1.0
    assert float(model.diagnostics(outputs, targets)["corner_score"]) > 0.99


def test_objects_that_touch_the_border_of_a_padded_image_are_recovered() -> None:
    model = _model()
    wanted = target([[40, 30, 60, 48], [0, 0, 3, 2]], [0, 1])
    found = sure(model.predict(_ideal(model, [wanted], (64, 64)), torch.tensor([[48, 60]]))[0])
    assert_close(in_order(found.boxes, found.labels), in_order(wanted.boxes, wanted.labels))


def _corners(points: list[tuple[float, float]], scores: list[float], labels: list[int], tags: list[float]) -> Corners:
    rows = torch.tensor([points]).float(), torch.tensor([scores]), torch.tensor([labels]), torch.tensor([tags])
    return Corners(*rows)


def test_pairs_are_of_one_class_close_in_tag_and_rightly_placed() -> None:
    first = _corners([(0, 0), (2, 2), (5, 5)], [0.9, 0.8, 0.7], [0, 1, 0], [0.0, 0.0, 3.0])
    second = _corners([(4, 4), (6, 3), (9, 9)], [0.8, 0.6, 0.5], [0, 1, 0], [0.5, 0.4, 3.6])
    boxes, scores, labels = _model()._pairs(first, second)
    kept = scores[0] > 0
    # (0,0)-(4,4) and (2,2)-(6,3); (5,5) lies beyond (4,4), and its tag is 0.6 from that of (9,9).
    assert_close(boxes[0, kept], torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 3]]))
    assert_close(scores[0, kept], torch.tensor([0.85, 0.7]))
    assert labels[0, kept].tolist() == [0, 1]
    wider = _model(max_distance=0.7)._pairs(first, second)[1]
    assert_close(wider[0, :3], torch.tensor([0.85, 0.7, 0.6]))


def test_the_loss_is_equation_10_by_hand() -> None:
    model = _model(classes=1)
    outputs = _blank((32, 32), 1, 1)
    maps = outputs.stacks[0]
    targets = [target([[2, 4, 13, 21], [8, 8, 30, 30]], [0, 0])]
    maps["top_left_tag"][0, 0, 1, 0], maps["bottom_right_tag"][0, 0, 5, 3] = 0.2, 0.6
    maps["top_left_tag"][0, 0, 2, 2], maps["bottom_right_tag"][0, 0, 7, 7] = 1.0, 0.8
    terms = model.loss(outputs, targets)
    # Means 0.4 and 0.9: 2 * (0.2^2 + 0.1^2) / 2 pulls, 1 - 0.5 pushes.
    assert_close(terms["loss_pull"].item(), 0.1 * 0.05)
    assert_close(terms["loss_push"].item(), 0.1 * 0.5)
    # Offsets where 0 is said: (0.5, 0), (0.25, 0.25), (0, 0), (0.5, 0.5); half their squares, over two objects.
    assert_close(terms["loss_offset"].item(), (0.25 + 0.125 + 0.5) / 2 / 2)
    truth = model.truth(outputs, targets)
    parts = [heatmap_focal_loss(torch.zeros(1, 1, 8, 8), corner.heat) for corner in truth.corners.values()]
    assert_close(terms["loss_heatmap"], (parts[0] + parts[1]) / 2)


def test_objects_that_share_a_corner_cell() -> None:
    model = _model()
    targets = [target([[9, 9, 40, 40], [10, 10, 20, 20]], [0, 0])]
    truth = model.truth(_blank((64, 64), 1), targets)
    assert truth.corners["top_left"].own.tolist() == [1]  # the smaller one says the offset
    assert truth.corners["bottom_right"].own.tolist() == [0, 1]
    assert int((truth.corners["top_left"].heat == 1).sum()) == 1


def test_a_batch_without_objects_touches_every_head() -> None:
    model = _model()
    terms = model.loss(model(torch.rand(2, 3, 32, 48)), [target([], []), target([], [])])
    torch.stack(list(terms.values())).sum().backward()
    values = {name: term.item() for name, term in terms.items()}
    assert values.pop("loss_heatmap") > 0 and set(values.values()) == {0.0}
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    figures = model.diagnostics(model(torch.rand(1, 3, 32, 32)), [target([], [])])
    assert [float(value) for value in figures.values()] == [0.0, 0.0]


def test_many_objects_and_a_single_class() -> None:
    model = _model(classes=1).eval()
    corner = torch.rand(2000, 2) * 110
    boxes = torch.cat([corner, corner + 1 + torch.rand(2000, 2) * 17], dim=1)
    outputs = model(torch.rand(1, 3, 128, 128))
    terms = model.loss(outputs, [Target(boxes=boxes, labels=torch.zeros(2000, dtype=torch.int64))])
    assert all(bool(term.isfinite()) for term in terms.values())
    found = model.predict(outputs, torch.tensor([[128, 128]]))[0]
    assert 0 < len(found) <= 100 and bool((found.labels == 0).all())


def test_the_paper_has_201_million_weights() -> None:
    with torch.device("meta"):
        model = CornerNet(num_classes=80, backbone=StackedHourglass())
    found = sum(value.numel() for value in model.parameters())
    assert found == pytest.approx(201.0e6, rel=1e-3)
