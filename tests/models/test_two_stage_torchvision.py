"""Ours on torchvision's weights against torchvision itself."""

import pytest
import torch
from torch.testing import assert_close

from models.two_stage_oracle import images, objects, padded, pair, torchvision_losses, torchvision_targets

TERMS = {"loss_objectness", "loss_rpn_box", "loss_classifier", "loss_box"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["faster", "mask"])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_predictions(kind: str, count: int) -> None:
    theirs, ours = pair(kind)
    pictures = images(count)
    batch, sizes = padded(pictures)
    expected = theirs(pictures)
    found = ours.predict(ours(batch, sizes), sizes)
    for mine, other in zip(found, expected, strict=True):
        assert len(mine) > 10 and mine.scores.std() > 0.02
        assert_close(mine.scores, other["scores"], rtol=1e-4, atol=1e-5)
        assert_close(mine.boxes, other["boxes"], rtol=1e-4, atol=1e-3)
        assert_close(mine.labels, other["labels"] - 1)
        if kind == "mask":
            soft = other["masks"][:, 0]
            sure = (soft - 0.5).abs() > 1e-4
            assert mine.masks is not None and 0.001 < mine.masks.float().mean() < 0.5
            assert_close(mine.masks[sure], (soft > 0.5)[sure])
        else:
            assert mine.masks is None


@pytest.mark.parametrize("kind", ["faster", "mask"])
@pytest.mark.parametrize("count, empty", [(1, None), (3, None), (3, 1), (1, 0)])
def test_equal_losses_without_chance(kind: str, count: int, empty: int | None) -> None:
    theirs, ours = pair(kind, sample_all=True)
    pictures, targets = images(count), objects(count, empty=empty)
    batch, sizes = padded(pictures)
    expected = torchvision_losses(theirs, pictures, targets)
    losses = ours.loss(ours(batch, sizes, targets), targets)
    assert set(losses) == TERMS | ({"loss_mask"} if kind == "mask" else set())
    for name, value in losses.items():
        assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert (value > 0) == (empty != 0 or count > 1 or name in ("loss_objectness", "loss_classifier"))


def test_equal_losses_under_one_seed() -> None:
    theirs, ours = pair("mask")
    pictures, targets = images(3), objects(3)
    batch, sizes = padded(pictures)
    torch.manual_seed(7)
    expected = torchvision_losses(theirs, pictures, targets)
    torch.manual_seed(7)
    losses = ours.loss(ours(batch, sizes, targets), targets)
    for name, value in losses.items():
        assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.manual_seed(8)
    other = ours.loss(ours(batch, sizes, targets), targets)
    assert other["loss_objectness"] != losses["loss_objectness"]  # the seed does matter


def test_equal_gradients_without_chance() -> None:
    theirs, ours = pair.__wrapped__("mask", sample_all=True)  # its own, as gradients stay
    pictures, targets = images(1), objects(1)
    sum(theirs.train()(pictures, torchvision_targets(targets)).values()).backward()
    batch, sizes = padded(pictures)
    sum(ours.loss(ours(batch, sizes, targets), targets).values()).backward()
    names = {
        "roi_heads.box_head.fc6.weight": "box.head.fc6.weight",
        "roi_heads.mask_head.0.0.weight": "mask.head.0.0.weight",
        "rpn.head.bbox_pred.weight": "rpn.head.bbox_pred.weight",
        "backbone.fpn.layer_blocks.0.0.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "backbone.body.conv1.weight": "backbone.body.conv1.weight",
    }
    for name, own in names.items():
        expected = theirs.get_parameter(name).grad
        assert expected is not None and expected.abs().max() > 0
        assert_close(ours.get_parameter(own).grad, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-3)


@torch.no_grad()
def test_resnet50_has_torchvisions_keys_and_predictions() -> None:
    theirs, ours = pair("mask", "resnet50")
    pictures = images(1)
    batch, sizes = padded(pictures)
    (expected,) = theirs(pictures)
    (found,) = ours.predict(ours(batch, sizes), sizes)
    assert len(found) > 10
    assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    assert_close(found.boxes, expected["boxes"], rtol=1e-4, atol=1e-3)
