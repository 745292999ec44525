from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.models.yolo_v1 import CellOutputs, YOLOv1
from detseg.nn import Darknet19, YOLOv1Body
from detseg.structures import Target

SIDE, STRIDE, GRID = 48, 16, 3


def yolo(**arguments: object) -> YOLOv1:
    body = Darknet19(widths=(4, 4, 4, 4, 8), depths=(1, 1, 1, 1, 1), strides=(16,))
    return YOLOv1(**{"num_classes": 3, "backbone": body, "image_size": SIDE, "hidden": None, **arguments}).eval()


def target(boxes: list[list[float]], labels: list[int] | None = None, crowd: int | None = None) -> Target:
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64),
        iscrowd=torch.arange(len(boxes)) == (-1 if crowd is None else crowd),
    )


def outputs(batch: int, seed: int = 0) -> CellOutputs:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand((batch, GRID * GRID, *shape), generator=generator) for shape in ((3,), (2, 4), (2,))]
    return CellOutputs(draw[0], draw[1] * 0.9, draw[2], (GRID, GRID))


def decoded(numbers: Tensor, row: int, column: int) -> Tensor:
    x, y, w, h = numbers.tolist()
    centre = torch.tensor([(column + x) * STRIDE, (row + y) * STRIDE])
    half = torch.tensor([w * w, h * h]) * SIDE / 2
    return torch.cat([centre - half, centre + half])


def equation_3(result: CellOutputs, targets: list[Target]) -> dict[str, float]:
    """The paper's double sum over cells and boxes, literally; objects are put into cells largest last."""
    box = confidence = classes = 0.0
    found = 0
    for index, truth in enumerate(targets):
        cells: dict[tuple[int, int], int] = {}
        areas = ((truth.boxes[:, 2] - truth.boxes[:, 0]) * (truth.boxes[:, 3] - truth.boxes[:, 1])).tolist()
        for row in sorted(range(len(truth)), key=lambda row: areas[row]):
            x, y = ((truth.boxes[row, :2] + truth.boxes[row, 2:]) / 2 / STRIDE).tolist()
            cells[int(y), int(x)] = row
        found += len(cells)
        for i in range(GRID * GRID):
            own = cells.get(divmod(i, GRID))
            responsible, iou = -1, [0.0, 0.0]
            if own is not None:
                pair = [decoded(result.boxes[index, i, j], *divmod(i, GRID)) for j in range(2)]
                iou = box_iou(torch.stack(pair), truth.boxes[own][None])[:, 0].tolist()
                responsible = 0 if iou[0] >= iou[1] else 1
            for j in range(2):
                c = float(result.confidence[index, i, j])
                if j != responsible:
                    confidence += 0.5 * c**2
                    continue
                confidence += (c - iou[j]) ** 2
                x0, y0, x1, y1 = truth.boxes[own].tolist()
                row, column = divmod(i, GRID)
                x, y, w, h = result.boxes[index, i, j].tolist()
                box += 5 * ((x - ((x0 + x1) / 2 / STRIDE - column)) ** 2 + (y - ((y0 + y1) / 2 / STRIDE - row)) ** 2)
                box += 5 * ((w - ((x1 - x0) / SIDE) ** 0.5) ** 2 + (h - ((y1 - y0) / SIDE) ** 0.5) ** 2)
            if own is not None:
                for k in range(3):
                    classes += (float(result.classes[index, i, k]) - (k == int(truth.labels[own]))) ** 2
    found = max(found, 1)
    return {"loss_box": box / found, "loss_confidence": confidence / found, "loss_classification": classes / found}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_equation_3(seed: int) -> None:
    """The first image has two objects in one cell, of which the larger counts; the second image has none."""
    result = outputs(3, seed)
    targets = [
        target([[2, 2, 10, 12], [1, 1, 14, 15], [20, 5, 44, 40]], [0, 1, 2]),
        target([]),
        target([[33, 30, 47, 46], [0, 16, 15, 30]], [1, 0]),
    ]
    found = {name: term.item() for name, term in yolo().loss(result, targets).items()}
    assert found == pytest.approx(equation_3(result, targets), rel=1e-4)


def test_where_nothing_overlaps_the_nearest_box_answers() -> None:
    result = outputs(1)
    result.boxes[0, 4, :, 2:] = 0.05  # two dots, away from the object's box
    result.boxes[0, 4, 0, :2], result.boxes[0, 4, 1, :2] = torch.tensor([0.9, 0.9]), torch.tensor([0.0, 0.3])
    terms = yolo().loss(result, [target([[17.0, 17, 27, 20]])])
    wanted = torch.tensor([22 / 16 - 1, 18.5 / 16 - 1, (10 / 48) ** 0.5, (3 / 48) ** 0.5])
    assert_close(terms["loss_box"], 5 * (result.boxes[0, 4, 1] - wanted).square().sum())


def test_encoding_and_decoding_are_inverses() -> None:
    model = yolo()
    low = torch.rand(50, 2) * 40
    boxes, cells = torch.cat([low, low + torch.rand(50, 2) * 40 + 0.5], dim=1), torch.randint(0, 3, (50, 2)).float()
    assert_close(model._decode(model._encode(boxes, cells), cells), boxes, rtol=1e-4, atol=1e-4)


def test_predictions_by_hand() -> None:
    """One box of one cell says something: half a confidence times four fifths of a class."""
    result = CellOutputs(torch.zeros(2, 9, 3), torch.zeros(2, 9, 2, 4), torch.zeros(2, 9, 2), (GRID, GRID))
    result.classes[1, 5, 2], result.confidence[1, 5, 1] = 0.8, 0.5
    result.boxes[1, 5, 1] = torch.tensor([0.25, 0.5, 0.5, -0.5])  # the sign of a root does not matter
    none, found = yolo().predict(result, torch.tensor([[48, 48], [48, 40]]))
    assert len(none) == 0 and found.labels.tolist() == [2]
    assert_close(found.scores, torch.tensor([0.4]))
    assert_close(found.boxes, torch.tensor([[36 - 6.0, 24 - 6, 40, 24 + 6]]))  # clipped to a width of 40
    result.classes[1, 5, 2], result.confidence[1, 5, 1] = 7.0, 3.0  # plain numbers may leave [0, 1], scores may not
    assert yolo().predict(result, torch.tensor([[48, 48], [48, 40]]))[1].scores.tolist() == [1.0]


def test_crowds_are_neither_objects_nor_empty() -> None:
    result = outputs(1)
    plain, crowd = [[1.0, 1, 14, 15]], [[1.0, 1, 14, 15], [16.0, 0, 48, 48]]
    terms = yolo().loss(result, [target(crowd, crowd=1)])
    right = [1, 2, 4, 5, 7, 8]  # cells of the second and third column
    saved = 0.5 * result.confidence[0, right].square().sum()
    assert_close(terms["loss_confidence"], yolo().loss(result, [target(plain)])["loss_confidence"] - saved)


@pytest.mark.parametrize("count", [0, 2000])
def test_no_objects_and_two_thousand(count: int) -> None:
    low = torch.rand(count, 2) * 40
    crowded = Target(boxes=torch.cat([low, low + 0.3], dim=1), labels=torch.zeros(count, dtype=torch.int64))
    model = yolo(num_classes=1)
    result = model(torch.rand(1, 3, SIDE, SIDE))
    terms = {name: term.item() for name, term in model.loss(result, [crowded]).items()}
    assert all(0 <= value < 1e3 for value in terms.values())
    assert (terms["loss_box"] == 0) == (count == 0) and terms["loss_confidence"] > 0


def test_convolutions_take_any_size() -> None:
    model = yolo()
    for height, width in ((37, 90), (5, 5), (64, 32)):
        result = model(torch.rand(2, 3, height, width))
        assert result.grid == (-(-height // 16), -(-width // 16))
        assert result.boxes.shape == (2, result.grid[0] * result.grid[1], 2, 4)
        model.loss(result, [target([[1, 1, 4, 4]]), target([])])
        assert len(model.predict(result, torch.tensor([[height, width]] * 2))) == 2


def test_the_papers_network_has_its_own_size_and_says_so() -> None:
    with torch.device("meta"):
        model = YOLOv1(num_classes=20, backbone=YOLOv1Body())
    connected = (7 * 7 * 1024 + 1) * 4096 + (4096 + 1) * 7 * 7 * 30
    assert sum(value.numel() for value in model.parameters()) == 60_155_968 + connected == 271_703_550
    small = YOLOv1(num_classes=3, backbone=YOLOv1Body(width=1 / 64), image_size=(64, 128), hidden=16)
    assert small(torch.rand(1, 3, 64, 128)).classes.shape == (1, 2, 3)
    with pytest.raises(ValueError, match=r"images of 64 x 128 pixels .* these are 64 x 64; .*model.hidden=null"):
        small(torch.rand(1, 3, 64, 64))
