from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.losses import SmoothL1
from detseg.models.localiser import Localiser, LocaliserOutputs, from_shares, largest_object, to_shares
from detseg.nn import TinyBackbone
from detseg.structures import Target


def localiser(**arguments: object) -> Localiser:
    return Localiser(num_classes=3, backbone=TinyBackbone(widths=(8, 8), stem=4), pool=4, **arguments).eval()


def target(
    *boxes: tuple[float, float, float, float], labels: list[int] | None = None, crowd: int | None = None
) -> Target:
    flags = torch.arange(len(boxes)) == (-1 if crowd is None else crowd)
    classes = torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64)
    return Target(boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=classes, iscrowd=flags)


def outputs(logits: Tensor, boxes: Tensor, size: tuple[int, int] = (50, 100)) -> LocaliserOutputs:
    return LocaliserOutputs(logits, boxes, image_size=size)


def test_the_largest_object_is_learnt_the_first_of_equals_and_no_crowd() -> None:
    small, large, crowd = (0.0, 0.0, 5.0, 5.0), (2.0, 2.0, 20.0, 12.0), (0.0, 0.0, 50.0, 50.0)
    found = largest_object(target(small, large, crowd, labels=[0, 2, 1], crowd=2))
    assert found.boxes.tolist() == [list(large)] and found.labels.tolist() == [2]
    twice = largest_object(target(large, (4.0, 4.0, 22.0, 14.0), labels=[1, 0]))
    assert twice.labels.tolist() == [1]
    assert len(largest_object(target())) == 0 and len(largest_object(target(crowd, crowd=0))) == 0
    assert len(largest_object(target((3.0, 3.0, 3.0, 9.0)))) == 0  # no area


def test_shares_by_hand_and_back() -> None:
    boxes = torch.tensor([[10.0, 5, 30, 25], [0, 0, 100, 50]])
    assert_close(to_shares(boxes, (50, 100)), torch.tensor([[0.2, 0.3, 0.2, 0.4], [0.5, 0.5, 1, 1]]))
    assert_close(from_shares(to_shares(boxes, (50, 100)), (50, 100)), boxes)
    assert_close(from_shares(torch.tensor([[0.5, 0.5, -0.3, 0.2]]), (50, 100)), torch.tensor([[50.0, 20, 50, 30]]))


@pytest.mark.parametrize("loss", [None, SmoothL1(beta=0.5)])
def test_losses_by_hand(loss: SmoothL1 | None) -> None:
    """Two images, one of them empty: it counts as background and in no box."""
    logits, boxes = torch.randn(2, 4), torch.rand(2, 4)
    model = localiser(box_loss=loss, box_weight=3.0)
    terms = model.loss(outputs(logits, boxes), [target(), target((10, 5, 30, 25), (1, 1, 4, 4), labels=[2, 1])])
    assert_close(terms["loss_classification"], F.cross_entropy(logits, torch.tensor([0, 3])))
    difference = (boxes[1] - torch.tensor([0.2, 0.3, 0.2, 0.4])).abs()
    bowl = torch.where(difference < 0.5, difference**2, difference - 0.25)  # beta 0.5: d^2 / (2 * 0.5)
    assert_close(terms["loss_box"], 3 * (difference.square() if loss is None else bowl).sum())


def test_losses_without_any_object_and_of_two_thousand() -> None:
    model = localiser()
    result = model(torch.rand(2, 3, 64, 64))
    terms = model.loss(result, [target(), target()])
    assert terms["loss_box"].item() == 0 and terms["loss_classification"].item() > 0
    many = torch.rand(2000, 4) * 30
    many[:, 2:] += many[:, :2] + 1
    crowded = Target(boxes=many, labels=torch.randint(0, 3, (2000,)))
    assert all(bool(term.isfinite()) for term in model.loss(result, [crowded, target()]).values())


def test_one_detection_per_image_with_the_classifiers_score() -> None:
    logits = torch.tensor([[0.0, 1, 3, 0], [9, 0, 0, 0]])
    boxes = torch.tensor([[0.2, 0.3, 0.2, 0.4], [0.5, 0.5, 1, 1]])
    found = localiser().predict(outputs(logits, boxes), torch.tensor([[50, 25], [50, 100]]))
    assert len(found[1]) == 0  # background; 1.2e-4 for each class
    assert found[0].labels.tolist() == [1]
    assert_close(found[0].scores, logits[0].softmax(0)[2:3])
    assert_close(found[0].boxes, torch.tensor([[10.0, 5, 25, 25]]))  # clipped to a width of 25


def test_any_image_size() -> None:
    model = localiser()
    for height, width in ((37, 90), (8, 8), (128, 64)):
        result = model(torch.rand(1, 3, height, width))
        assert result.logits.shape == (1, 4) and result.boxes.shape == (1, 4)
        assert len(model.predict(result, torch.tensor([[height, width]]))) == 1


def test_accuracies_by_hand() -> None:
    """Right; missed by the box; the other, smaller object; nothing, and nothing seen; nothing, but something seen."""
    logits = F.one_hot(torch.tensor([1, 1, 2, 0, 3]), 4).float()
    boxes = to_shares(torch.tensor([[10.0, 5, 30, 25]] * 5), (50, 100))
    near, far = (12.0, 5.0, 30.0, 25.0), (60.0, 20.0, 90.0, 50.0)
    truth = [target(near), target(far), target(far, near, labels=[0, 1]), target(), target()]
    found = localiser().diagnostics(outputs(logits, boxes), truth)
    assert_close(found["classified"], torch.tensor(4 / 5))
    assert_close(found["localised"], torch.tensor(3 / 5))
