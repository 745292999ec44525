import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from detseg.models import mask_branch as module
from detseg.models.box_branch import RegionSamples
from detseg.models.mask_branch import MaskBranch, mask_targets
from detseg.models.region_features import RegionAlign
from detseg.structures import Detections, Target


def branch(**options: object) -> MaskBranch:
    pooling = RegionAlign(output_size=4, levels=1)
    return MaskBranch(num_classes=2, channels=3, widths=[5, 6], pooling=pooling, **options)  # type: ignore[arg-type]


def target(count: int = 5) -> Target:
    corner = torch.rand(count, 2) * 30
    boxes = torch.cat([corner, corner + 8], dim=1)
    return Target(boxes=boxes, labels=torch.arange(count) % 2, masks=torch.rand(count, 40, 50) > 0.5)


def test_targets_equal_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = target()
    rows = torch.tensor([4, 0, 0, 2, 1])
    boxes = truth.boxes[rows] + torch.rand(5, 4)
    assert truth.masks is not None
    expected = project_masks_on_boxes(truth.masks, boxes, rows, 28)
    whole = mask_targets(truth, boxes, rows, 28)
    assert_close(whole, expected)
    monkeypatch.setattr(module, "_PIXELS", 2 * 40 * 50)  # two masks at a time
    assert_close(mask_targets(truth, boxes, rows, 28), expected)


def test_rows_count_the_learnable_objects() -> None:
    truth = target()
    truth.iscrowd[0] = True
    assert truth.masks is not None
    box = truth.boxes[[1]]
    expected = project_masks_on_boxes(truth.masks, box, torch.tensor([1]), 8)
    assert_close(mask_targets(truth, box, torch.tensor([0]), 8), expected)


def test_missing_masks_name_the_image() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9]])
    truth = Target(boxes=boxes, labels=torch.tensor([0]), image_id=77)
    with pytest.raises(ValueError, match="image 77: 1 objects without masks"):
        mask_targets(truth, boxes, torch.tensor([0]), 28)


def test_loss_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8], [20, 20, 28, 28]])
    full = torch.ones(1, 40, 50, dtype=torch.bool)
    truth = Target(boxes=boxes[:1], labels=torch.tensor([1]), masks=full)
    samples = RegionSamples([boxes], [torch.tensor([2, 0])], [torch.tensor([0, 0])], [boxes])
    mask = branch()
    assert mask.positives(samples).tolist() == [[0, 0, 0, 8, 8]]
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 100.0  # the other class's mask does not count
    losses = mask.loss(logits, samples, [truth])
    assert_close(losses["loss_mask"], torch.tensor(math.log(2)))


def test_no_positives_is_a_zero_loss_with_gradients() -> None:
    mask = branch()
    none = torch.zeros(0, 4)
    labels = torch.zeros(0, dtype=torch.int64)
    samples = RegionSamples([none], [labels], [labels], [none])
    logits = mask([torch.randn(1, 3, 10, 10)], mask.positives(samples), [4])
    losses = mask.loss(logits, samples, [Target(boxes=none, labels=labels)])
    assert losses["loss_mask"] == 0
    losses["loss_mask"].backward()
    assert all(parameter.grad is not None for parameter in mask.parameters())


def test_masks_have_the_valid_size_and_chunks_change_nothing() -> None:
    features, sizes = [torch.randn(2, 3, 10, 13)], torch.tensor([[40, 50], [33, 41]])
    found = [
        Detections(target(count).boxes.clamp(max=33), torch.rand(count), torch.arange(count) % 2) for count in (5, 3)
    ]
    mask = branch()
    with torch.no_grad():
        mask.predictor.mask_fcn_logits.weight.mul_(20)
        drawn = mask.draw(features, found, [4], sizes)
        mask.chunk = 2
        again = mask.draw(features, found, [4], sizes)
    for one, two, size in zip(drawn, again, [(40, 50), (33, 41)], strict=True):
        assert one.masks is not None and two.masks is not None
        assert one.masks.shape == (len(one), *size) and one.masks.any()
        assert_close(one.masks, two.masks)


def test_images_without_detections() -> None:
    empty = [Detections.empty(), Detections.empty()]
    drawn = branch().draw([torch.randn(2, 3, 10, 10)], empty, [4], torch.tensor([[40, 40], [20, 30]]))
    shapes = [detections.masks.shape for detections in drawn if detections.masks is not None]
    assert shapes == [(0, 40, 40), (0, 20, 30)]
