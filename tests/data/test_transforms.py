from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision import tv_tensors

from detseg.data.transforms import DetectionEval, DetectionTrain, Recipe, SemanticEval, SemanticTrain
from detseg.structures import PanopticMap, SemanticMap, Target


def scene(masks: bool = True) -> tuple[torch.Tensor, Target]:
    """Three objects on 40 x 60: at the left edge, in the middle, and a crowd at the right."""
    boxes = torch.tensor([[0.0, 10.0, 6.0, 20.0], [20.0, 8.0, 40.0, 32.0], [52.0, 0.0, 60.0, 40.0]])
    painted = torch.zeros((3, 40, 60), dtype=torch.bool)
    labels = torch.zeros((40, 60), dtype=torch.int64)
    for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        painted[number, y1:y2, x1:x2] = True
        labels[y1:y2, x1:x2] = number + 1
    image = torch.zeros((3, 40, 60), dtype=torch.uint8)
    image[:, labels > 0] = (labels[labels > 0] * 80).to(torch.uint8)
    target = Target(
        boxes=boxes,
        labels=torch.tensor([4, 5, 6]),
        masks=painted if masks else None,
        iscrowd=torch.tensor([False, False, True]),
        difficult=torch.tensor([True, False, False]),
        area=torch.tensor([60.0, 240.0, 320.0]),  # the second is COCO's: half of its box
        image_id=9,
        size=(40, 60),
        semantic=SemanticMap(labels),
        panoptic=PanopticMap(labels, torch.tensor([4, 5, 6]), torch.ones(3, dtype=torch.bool)),
        file="a.png",
    )
    return image, target


def test_eval_recipe_resizes_everything_and_drops_nothing() -> None:
    image, target = scene()
    seen, changed = DetectionEval(size=(80, 120))(image, target)
    assert isinstance(seen, tv_tensors.Image) and seen.dtype == torch.uint8 and seen.shape == (3, 80, 120)
    assert_close(changed.boxes, target.boxes * 2)
    assert_close(changed.area, target.area * 4)
    assert changed.size == (80, 120) and changed.image_id == 9 and changed.file == "a.png"
    assert changed.masks is not None and changed.semantic is not None and changed.panoptic is not None
    assert changed.masks.flatten(1).sum(dim=1).tolist() == [240, 1920, 1280]
    assert changed.semantic.labels.flatten().bincount().tolist() == [80 * 120 - 3440, 240, 1920, 1280]
    assert_close(changed.panoptic.segments, changed.semantic.labels)
    small, shrunk = DetectionEval(size=(2, 3))(image, target)
    assert small.shape == (3, 2, 3) and len(shrunk) == 3


def test_flip_mirrors_image_boxes_masks_and_maps_together() -> None:
    image, target = scene()
    seen, changed = Recipe(flip=1.0)(image, target)
    assert_close(seen.as_subclass(torch.Tensor), image.flip(2))
    assert changed.boxes.tolist() == [[54, 10, 60, 20], [20, 8, 40, 32], [0, 0, 8, 40]]
    assert target.masks is not None and changed.masks is not None
    assert_close(changed.masks, target.masks.flip(2))
    assert changed.semantic is not None and target.semantic is not None
    assert_close(changed.semantic.labels, target.semantic.labels.flip(1))
    upside, turned = Recipe(vertical_flip=1.0)(image, target)
    assert_close(upside.as_subclass(torch.Tensor), image.flip(1))
    assert turned.boxes.tolist() == [[0, 20, 6, 30], [20, 8, 40, 32], [52, 0, 60, 40]]


@pytest.mark.parametrize("masks", [False, True])
def test_crop_drops_every_field_of_an_object_together(masks: bool) -> None:
    image, target = scene(masks)
    dropped = set()
    for seed in range(30):
        torch.manual_seed(seed)
        _, changed = Recipe(crop=(40, 30))(image, target)
        labels = changed.labels.tolist()
        dropped |= {4, 5, 6} - set(labels)
        assert changed.iscrowd.tolist() == [label == 6 for label in labels]
        assert changed.difficult.tolist() == [label == 4 for label in labels]
        assert len(changed.boxes) == len(changed.area) == len(labels)
        assert bool((changed.boxes >= 0).all()) and bool((changed.boxes[:, 2] <= 30).all())
        if masks:
            assert changed.masks is not None and changed.semantic is not None
            for box, mask, label in zip(changed.boxes.int().tolist(), changed.masks, labels, strict=True):
                x1, y1, x2, y2 = box
                assert int(mask.sum()) == (x2 - x1) * (y2 - y1) == int(mask[y1:y2, x1:x2].sum())
                assert bool((changed.semantic.labels[mask] == label - 3).all())
        share = (changed.boxes[:, 2] - changed.boxes[:, 0]) / torch.tensor([0, 0, 0, 0, 6.0, 20.0, 8.0])[changed.labels]
        assert_close(changed.area, torch.tensor([0, 0, 0, 0, 60.0, 240.0, 320.0])[changed.labels] * share)
        assert bool((share >= 0.1).all())
    assert dropped == {4, 6}  # the middle one is always in sight


def test_objects_whose_mask_is_cut_away_are_dropped_though_their_box_is_not() -> None:
    masks = torch.zeros((1, 20, 20), dtype=torch.bool)
    masks[0, :, 18:] = True  # an L: the box is wide, the pixels are at the right
    masks[0, 18:, :] = True
    target = Target(boxes=torch.tensor([[0.0, 0.0, 20.0, 20.0]]), labels=torch.tensor([0]), masks=masks)
    image = torch.zeros((3, 20, 20), dtype=torch.uint8)
    lengths = set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, changed = Recipe(crop=(12, 12))(image, target)
        lengths.add(len(changed))
        assert changed.masks is not None
        for box, mask in zip(changed.boxes.tolist(), changed.masks, strict=True):
            rows, columns = mask.nonzero().unbind(dim=1)  # the box is that of what is left
            assert box == [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert lengths == {0, 1}


def test_pixels_outside_the_image_are_ignored_and_filled() -> None:
    image, target = scene()
    seen, changed = SemanticTrain(crop=(50, 70), flip=0.0, fill=33)(image, target)
    assert changed.semantic is not None and changed.panoptic is not None
    outside = changed.semantic.labels == 255
    assert int(outside.sum()) == 50 * 70 - 40 * 60
    assert bool((seen.as_subclass(torch.Tensor)[:, outside] == 33).all())
    assert bool((changed.panoptic.segments[outside] == 0).all())
    target.semantic = SemanticMap(target.semantic.labels, ignore_index=77)  # type: ignore[union-attr]
    _, other = SemanticTrain(crop=(50, 70), flip=0.0)(image, target)
    assert other.semantic is not None and int((other.semantic.labels == 77).sum()) == 50 * 70 - 40 * 60


def test_an_image_without_objects_passes() -> None:
    target = Target(
        boxes=torch.zeros((0, 4)),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros((0, 40, 60), dtype=torch.bool),
    )
    recipe = DetectionTrain(
        size=(20, 30), scale=(0.5, 1.5), flip=1.0, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1
    )
    seen, changed = recipe(torch.zeros((3, 40, 60), dtype=torch.uint8), target)
    assert seen.shape == (3, 20, 30) and len(changed) == 0 and changed.masks is not None
    assert changed.masks.shape == (0, 20, 30) and changed.size == (20, 30)


def test_colour_changes_after_the_resize_and_stays_uint8() -> None:
    recipe = DetectionTrain(size=(20, 30), brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1)
    names = [type(step).__name__ for step in recipe.steps]
    assert names == ["ResizeAndCrop", "RandomHorizontalFlip", "ColourJitter", "HueShift"]
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8))
    before = image.clone()
    seen, _ = recipe(image, scene(masks=False)[1])
    assert seen.dtype == torch.uint8
    plain, _ = DetectionEval(size=(20, 30))(image, scene(masks=False)[1])
    assert not torch.equal(seen.as_subclass(torch.Tensor), plain.as_subclass(torch.Tensor))
    assert_close(image, before)  # cached pixels are shared
    assert "hue" not in repr(recipe) and "size=(20, 30)" in repr(recipe)


@pytest.mark.parametrize("recipe", [DetectionTrain, SemanticTrain])
def test_recipes_of_a_group_share_their_arguments(recipe: type[Recipe]) -> None:
    wanted = {name for name in inspect.signature(Recipe.__init__).parameters if name != "self"}
    assert set(inspect.signature(recipe.__init__).parameters) - {"self"} == wanted
    assert inspect.signature(SemanticEval.__init__) == inspect.signature(DetectionEval.__init__)
    arguments: dict[str, Any] = {"size": (8, 8)}
    assert isinstance(recipe(**arguments), Recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        DetectionEval(size=(50, 90)),
        DetectionEval(short_side=33, long_side=60),
        Recipe(flip=1.0),
        Recipe(vertical_flip=1.0, hue=0.1),
        DetectionTrain(size=(64, 64), scale=(0.4, 2.5), vertical_flip=0.5, brightness=0.3, min_visible=0.0),
        DetectionTrain(crop=(30, 30), scale=(0.7, 1.3), min_visible=0.0),
        DetectionTrain(short_side=48, scale=(0.5, 1.5), min_side=3.0, min_visible=0.0),
    ],
    ids=repr,
)
def test_a_proposal_that_is_an_objects_box_stays_it(recipe: Recipe) -> None:
    """Of an object any part stays where ``min_visible`` is 0, as of a proposal."""
    image, target = scene(masks=False)
    target.proposals = target.boxes.clone()
    kept = set()
    for seed in range(40):
        torch.manual_seed(seed)
        _, changed = recipe(image, target)
        assert changed.proposals is not None
        assert_close(changed.proposals, changed.boxes, rtol=0, atol=0)
        kept.add(len(changed.boxes))
    assert max(kept) >= 2


def test_of_a_proposal_any_part_that_is_large_enough_stays() -> None:
    image, target = scene()
    target.proposals = torch.tensor([[0.0, 0, 60, 40], [58, 0, 60, 40], [10, 10, 10, 20], [-5, -5, 1, 1]])
    _, seen = DetectionEval(size=(80, 120))(image, target)
    assert seen.proposals is not None
    assert seen.proposals.tolist() == [[0, 0, 120, 80], [116, 0, 120, 80], [0, 0, 2, 2]]  # one had no area
    _, seen = Recipe(min_side=3.0, min_visible=0.5)(image, target)
    assert seen.proposals is not None and seen.proposals.tolist() == [[0, 0, 60, 40]]
    _, none = Recipe()(image, scene()[1])
    assert none.proposals is None
    target.proposals = torch.zeros((0, 4))
    _, empty = Recipe(flip=1.0, crop=(20, 20))(image, target)
    assert empty.proposals is not None and empty.proposals.shape == (0, 4)
