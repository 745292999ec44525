from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detseg.data.augment.colour import ColourJitter, HueShift, PhotometricDistort, brighten, contrast, saturate
from detseg.data.geometry import as_image, as_pixels


def photo(seed: int = 0) -> Tensor:
    """Smooth colours over the whole range, (3, 40, 60)."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return as_image(cv2.resize(noise, (60, 40), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("factor", [0.3, 0.875, 1.0, 1.7])
def test_each_step_is_torchvisions(factor: float) -> None:
    image = photo()
    pairs = [(brighten, F.adjust_brightness, 0), (contrast, F.adjust_contrast, 1), (saturate, F.adjust_saturation, 2)]
    for ours, theirs, levels in pairs:
        found, expected = as_image(ours(as_pixels(image), factor)), theirs(image, factor)
        assert int((found.int() - expected.int()).abs().max()) <= levels, ours.__name__


def test_a_grey_image_has_no_saturation_to_change_and_contrast_keeps_the_mean() -> None:
    grey = np.full((4, 5, 3), 90, np.uint8)
    assert (saturate(grey, 1.9) == 90).all()
    halves = np.repeat(np.array([[[60] * 3, [140] * 3]], np.uint8), 4, axis=0)  # mean 100
    assert set(contrast(halves, 0.5).reshape(-1).tolist()) <= {79, 80, 119, 120}
    assert brighten(halves, 2.0)[0, :, 0].tolist() == [120, 255]


def test_draws_and_order_are_torchvisions() -> None:
    """The same random numbers give the same picture, but for 8-bit rounding between the steps."""
    ours, theirs = PhotometricDistort(probability=0.8), v2.RandomPhotometricDistort(p=0.8)
    orders = set()
    for seed in range(40):
        image = tv_tensors.Image(photo(seed))
        torch.manual_seed(seed)
        params = ours.make_params([image])
        torch.manual_seed(seed)
        expected = theirs.make_params([image])
        assert {name: params[name] for name in params if name != "channel_permutation"} == {
            name: expected[name] for name in expected if name != "channel_permutation"
        }
        orders.add(params["contrast_before"])
        difference = (
            ours.transform(image, params).int()
            - theirs.transform(image, expected | {"channel_permutation": None}).int()
        )
        assert float(difference.abs().float().mean()) < 2.0
    assert orders == {True, False}


def test_jitter_draws_as_torchvision_does_in_every_order() -> None:
    ours, theirs = ColourJitter(brightness=0.4, contrast=0.3, saturation=0.5), v2.ColorJitter(0.4, 0.3, 0.5)
    orders = set()
    for seed in range(60):
        image = tv_tensors.Image(photo(seed))
        torch.manual_seed(seed)
        found = ours(image)
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        orders.add(tuple(n for n in ours.make_params([image])["fn_idx"].tolist() if n < 3))
        difference = (found.int() - expected.int()).abs()
        assert int(difference.max()) <= 5 and float(difference.float().mean()) < 1.0  # levels; each step rounds once
    assert len(orders) == 6


def test_of_a_jitter_only_what_is_asked_for_changes() -> None:
    image = tv_tensors.Image(photo())
    boxes = tv_tensors.BoundingBoxes(torch.ones((1, 4)), format="XYXY", canvas_size=(40, 60))
    changed = ColourJitter(saturation=0.9)({"image": image, "boxes": boxes})
    assert changed["boxes"] is boxes and not torch.equal(changed["image"], image)
    assert_close(ColourJitter()(image), image)
    grey = tv_tensors.Image(torch.full((3, 4, 5), 90, dtype=torch.uint8))
    assert (ColourJitter(saturation=0.9)(grey) == 90).all()
    with pytest.raises(ValueError, match="brightness"):
        ColourJitter(brightness=-0.1)


def test_a_hue_beyond_half_the_circle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 0.5\]"):
        HueShift(0.6)


def test_hue_turns_by_the_amount_and_leaves_grey_alone() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
    turned = HueShift(0.5).transform(tv_tensors.Image(red), {"turn": 1 / 3})
    assert_close(turned[:, 0, 0].float(), torch.tensor([0.0, 255.0, 0.0]), atol=6, rtol=0)  # a third on is green
    grey = torch.full((3, 4, 4), 90, dtype=torch.uint8)
    assert_close(HueShift(0.5)(tv_tensors.Image(grey)).as_subclass(torch.Tensor), grey)
    mask = tv_tensors.Mask(grey)
    assert HueShift(0.5)(mask) is mask


def test_hue_agrees_with_torchvision_within_rounding() -> None:
    smooth = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), (9, 9), 4)
    image = torch.from_numpy(smooth).permute(2, 0, 1)
    ours = HueShift(0.5).transform(tv_tensors.Image(image), {"turn": 0.1}).float()
    theirs = v2.functional.adjust_hue(image, 0.1).float()
    assert float((ours - theirs).abs().mean()) < 2.0
    assert float((ours - image.float()).abs().mean()) > 3.0


def test_channels_are_reordered_only_where_asked_for() -> None:
    image = tv_tensors.Image(photo())
    assert_close(PhotometricDistort(probability=0.0)(image), image)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        changed = PhotometricDistort(probability=0.0, channels=1.0)(image)
        order = tuple(next(c for c in range(3) if torch.equal(changed[to], image[c])) for to in range(3))
        assert sorted(order) == [0, 1, 2]
        seen.add(order)
    assert len(seen) == 6


def test_the_pixels_given_stay_and_boxes_pass() -> None:
    image = tv_tensors.Image(photo())
    before = image.clone()
    boxes = tv_tensors.BoundingBoxes(torch.ones((1, 4)), format="XYXY", canvas_size=(40, 60))
    changed = PhotometricDistort(probability=1.0)({"image": image, "boxes": boxes})
    assert_close(image, before)
    assert changed["boxes"] is boxes and changed["image"].dtype == torch.uint8
    assert not torch.equal(changed["image"], image)
