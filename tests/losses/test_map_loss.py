"""What every loss of a class map keeps, whatever it measures; every file of ``conf/segmentation_loss`` is tried."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.losses import DiceLoss, HardPixelLoss, LovaszLoss, SegmentationLoss, SumOfLosses
from shared import REPO

FOLDER = REPO / "conf" / "segmentation_loss"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def section(name: str) -> Any:
    cfg = load_config("model=unet_small", f"segmentation_loss@model.loss={name}")
    return OmegaConf.to_container(cfg.model.loss, resolve=True)


def build(name: str) -> Any:
    return instantiate(section(name), path="model.loss")


def test_every_kind_of_loss_is_there():
    asked = "boundary cross_entropy cross_entropy_dice dice dice_squared focal jaccard lovasz ohem sum tversky"
    assert asked.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_every_argument_of_its_class(name):
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if "defaults" in content:
        return
    loss = build(name)
    assert set(content) - {"_target_"} == set(inspect.signature(type(loss)).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_change_nothing_and_get_no_gradient(name):
    loss = build(name)
    logits = torch.randn(2, 4, 6, 5)
    labels = torch.randint(0, 3, (2, 6, 5))  # class 3 is absent
    labels[0, :2] = 255
    other = logits.clone()
    other[0, :, :2] += 5 * torch.randn(4, 2, 5)
    other.requires_grad_()
    terms, plain = loss(other, labels), loss(logits, labels)
    for key, value in terms.items():
        assert value.isfinite()
        assert_close(value.detach(), plain[key])
    torch.stack(list(terms.values())).sum().backward()
    assert float(other.grad[0, :, :2].abs().max()) == 0
    assert float(other.grad.abs().max()) > 0
    assert other.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_is_zero(name, dtype):
    logits = torch.randn(1, 3, 4, 4, dtype=dtype, requires_grad=True)
    terms = build(name)(logits, torch.full((1, 4, 4), 255))
    assert {value.item() for value in terms.values()} == {0.0}
    torch.stack(list(terms.values())).sum().backward()
    assert float(logits.grad.abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_costs_no_digits_beyond_those_of_the_logits(name, dtype):
    loss = build(name)
    labels = torch.randint(0, 3, (2, 24, 20))
    labels[0, :4] = 255
    logits = (3 * torch.randn(2, 4, 24, 20)).to(dtype).requires_grad_()
    single = logits.detach().float().requires_grad_()
    expected = loss(single, labels)
    with torch.autocast("cpu", dtype=dtype):
        terms = loss(logits, labels)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    for key, value in terms.items():
        assert_close(value, expected[key])
    scale = 65536  # what torch's GradScaler begins with
    (scale * torch.stack(list(terms.values())).sum()).backward()
    torch.stack(list(expected.values())).sum().backward()
    digits = torch.finfo(dtype).eps  # of the gradient, which is as wide as the logits
    assert_close(logits.grad.float() / scale, single.grad, rtol=digits, atol=1e-7)


@pytest.mark.parametrize("loss", [DiceLoss(smooth=0.0), DiceLoss(smooth=0.0, squared=True)])
def test_nothing_valid_is_zero_without_smoothing(loss):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 4, 4), 255))["loss_dice"]
    value.backward()
    assert value.item() == 0.0
    assert float(logits.grad.abs().max()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_right_map_loses_less_than_a_wrong_one(name):
    loss = build(name)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, 2:5, 2:6], labels[:, 6:, :] = 1, 2
    right = 12.0 * torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2)
    wrong = right.roll(1, dims=1)
    values = [sum(value.item() for value in loss(given, labels).values()) for given in (right, wrong)]
    assert values[0] < 0.05
    assert values[1] > values[0] + 0.02


def test_a_sum_names_all_terms_and_scales_each():
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    both = SumOfLosses(losses={"a": SegmentationLoss(), "b": LovaszLoss(weight=0.5), "c": None})
    terms = both(logits, labels)
    assert list(terms) == ["loss_cross_entropy", "loss_lovasz"]
    assert_close(terms["loss_lovasz"], 0.5 * LovaszLoss()(logits, labels)["loss_lovasz"])
    weights = torch.full((1, 4, 4), 2.0)
    weights[:, :2] = 1.0
    weighed = both(logits, labels, weights)
    assert_close(weighed["loss_lovasz"], terms["loss_lovasz"])
    assert_close(weighed["loss_cross_entropy"], SegmentationLoss()(logits, labels, weights)["loss_cross_entropy"])


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_names_its_terms_before_it_is_asked(name):
    loss = build(name)
    assert sorted(loss.terms) == sorted(loss(torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))))


def test_two_terms_of_a_name_are_found_when_a_sum_is_built():
    with pytest.raises(ValueError, match=r"\['a', 'b'\] give the term loss_cross_entropy; leave one out"):
        SumOfLosses(losses={"a": SegmentationLoss(), "b": HardPixelLoss()})
    within = SumOfLosses(losses={"c": SegmentationLoss(dice=1.0)})
    with pytest.raises(ValueError, match=r"\['a', 'b'\] give the term loss_dice; leave one out"):
        SumOfLosses(losses={"a": within, "b": DiceLoss()})
    SumOfLosses(losses={"a": SegmentationLoss(cross_entropy=0.0, dice=1.0), "b": HardPixelLoss()})


def test_a_loss_that_names_no_terms_before_is_found_at_the_first_step():
    class Foreign(torch.nn.Module):
        ignore_index = 255

        def forward(self, logits, labels, pixel_weights=None):
            return {"loss_dice": logits.sum()}

    both = SumOfLosses(losses={"a": DiceLoss(), "b": Foreign()})
    with pytest.raises(ValueError, match=r"\['a', 'b'\] give the term loss_dice; leave one out"):
        both(torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4)))


DICE = SegmentationLoss(cross_entropy=0.0, dice=1.0)


@pytest.mark.parametrize("loss", [DiceLoss(), DICE, SumOfLosses(losses={"a": DICE, "b": LovaszLoss()})])
def test_weights_of_pixels_are_refused_where_no_term_could_take_them(loss):
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    wanted = f"{type(loss).__name__} has no sum over pixels that separation could weigh; set separation=0, or add"
    with pytest.raises(ValueError, match=wanted):
        loss(logits, labels, torch.ones(1, 4, 4))
    outer = SumOfLosses(losses={"in": loss, "out": SegmentationLoss()})
    weights = torch.rand(1, 4, 4) + 1  # go to the cross entropy alone
    assert_close(outer(logits, labels, weights), loss(logits, labels) | SegmentationLoss()(logits, labels, weights))


def test_errors():
    with pytest.raises(ValueError, match=r"0 losses with ignore indices \[\]"):
        SumOfLosses(losses={"a": None})
    with pytest.raises(ValueError, match=r"2 losses with ignore indices \[0, 255\]"):
        SumOfLosses(losses={"a": DiceLoss(ignore_index=0), "b": LovaszLoss()})
    with pytest.raises(ValueError, match="weight 0 must be above 0"):
        LovaszLoss(weight=0)
