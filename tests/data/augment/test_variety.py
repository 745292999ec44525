from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.data.augment import Augment, Context
from detseg.data.augment.variety import largest_share, varied
from detseg.data.geometry import TRIES, ResizeAndCrop, Window
from detseg.data.transforms import SemanticTrain
from detseg.structures import SemanticMap, Target


def scene(labels: Tensor) -> tuple[Tensor, Target]:
    """An image whose grey is ten times the label, 200 where it is ignored."""
    grey = torch.where(labels == 255, 20, labels) * 10
    target = Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels))
    return grey.to(torch.uint8).expand(3, *labels.shape).clone(), target


def halves() -> Tensor:
    """8 x 100: class 0 on the left, class 1 on the right."""
    return (torch.arange(100) >= 50).long().expand(8, 100).clone()


def crops(recipe: SemanticTrain, labels: Tensor, seeds: int) -> list[Tensor]:
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        image, target = recipe(*scene(labels))
        assert target.semantic is not None
        truth = scene(target.semantic.labels)[0]  # (3, H, W)
        assert_close(
            image.as_subclass(Tensor).float(), truth.float(), rtol=0, atol=11 if recipe.geometry.scale[0] < 1 else 0
        )
        found.append(target.semantic.labels)
    return found


def share(labels: Tensor) -> float:
    counts = labels[labels != 255].bincount()
    return float(counts.max() / counts.sum())


def window(start: tuple[int, int], span: tuple[int, int]) -> Window:
    return Window(start=start, span=span, shown=span, offset=(0, 0), canvas=span)


def test_the_share_is_of_labelled_pixels_alone():
    labels = torch.tensor([[0, 0, 0, 1], [2, 2, 255, 255]])
    semantic = SemanticMap(labels)
    assert largest_share(semantic, window((0, 0), (2, 4))) == pytest.approx(3 / 6)
    assert largest_share(semantic, window((0, 2), (2, 2))) == pytest.approx(1 / 2)
    assert largest_share(semantic, window((1, 2), (1, 2))) == 1.0  # none is labelled
    padded = Window(start=(0, 0), span=(2, 4), shown=(2, 4), offset=(1, 1), canvas=(9, 9))
    assert largest_share(semantic, padded) == pytest.approx(3 / 6)
    doubled = Window(start=(0, 2), span=(1, 2), shown=(2, 4), offset=(0, 0), canvas=(2, 4))
    assert largest_share(SemanticMap(labels, ignore_index=1), doubled) == 1.0


def test_where_nothing_can_be_told_no_crop_is_refused():
    _, target = scene(halves())
    assert varied(target, 1.0) is None
    target.semantic = None
    assert varied(target, 0.5) is None


def test_as_many_crops_are_varied_as_ten_draws_give():
    """Of 81 places of a 20 px crop 11 show at most 15 columns of either class."""
    found = crops(SemanticTrain(crop=(8, 20), cat_max_ratio=0.75), halves(), 600)
    varied_ones = sum(share(labels) <= 0.75 for labels in found) / 600
    assert varied_ones == pytest.approx(1 - (70 / 81) ** TRIES, abs=0.05)  # 0.768; standard deviation 0.017
    plain = sum(share(labels) <= 0.75 for labels in crops(SemanticTrain(crop=(8, 20)), halves(), 600)) / 600
    assert plain == pytest.approx(11 / 81, abs=0.05)


def test_a_crop_that_will_do_is_the_one_drawn_without_asking():
    labels = (torch.arange(100) // 5).remainder(2).expand(8, 100).clone()
    recipes = [SemanticTrain(crop=(8, 30), scale=(0.5, 1.5), cat_max_ratio=ratio, fill=200) for ratio in (0.9, 1.0)]
    for asked, plain in zip(*(crops(recipe, labels, 20) for recipe in recipes), strict=True):
        assert_close(asked, plain)


def test_the_place_is_drawn_anew_and_the_scale_is_not():
    seen: list[Window] = []

    def never(candidate: Window) -> bool:
        seen.append(candidate)
        return False

    torch.manual_seed(0)
    last = ResizeAndCrop(crop=(20, 20), scale=(0.5, 2.0)).draw((60, 90), good=never)
    assert len(seen) == TRIES and seen[-1] == last
    assert len({candidate.span for candidate in seen}) == 1 and len({candidate.start for candidate in seen}) > 5
    seen.clear()
    whole = ResizeAndCrop(crop=(100, 100)).draw((60, 90), good=never)
    assert seen == [] and whole.span == (60, 90)  # all of the image is seen from anywhere


@pytest.mark.parametrize("labels", [torch.zeros((30, 40)), torch.full((30, 40), 255), torch.ones((1, 40))])
def test_images_of_one_class_or_none_come_through(labels: Tensor):
    recipe = SemanticTrain(crop=(16, 16), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, fill=200)
    for found in crops(recipe, labels.long(), 10):
        assert found.shape == (16, 16) and set(found.unique().tolist()) <= {int(labels[0, 0]), 255}


def test_crops_under_colours_and_a_frame_are_judged_by_what_they_show():
    recipe = SemanticTrain(crop=(8, 20), cat_max_ratio=0.75, augment=Augment(photometric=1e-9))
    image, target = scene(halves())
    context = Context(images=1, read=lambda number: (image, target))
    good = 0
    for seed in range(300):
        torch.manual_seed(seed)
        _, seen = recipe(image, target, context)
        assert seen.semantic is not None
        good += share(seen.semantic.labels) <= 0.75
    assert good / 300 == pytest.approx(1 - (70 / 81) ** TRIES, abs=0.08)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_a_ratio_outside_its_range(ratio: float):
    with pytest.raises(ValueError, match=rf"cat_max_ratio is a share of pixels.*got {ratio}"):
        SemanticTrain(cat_max_ratio=ratio)


def test_crop_based_training_as_a_whole():
    """Scale 0.5 to 2, crop, flip, colours: the size is fixed, what lies outside is ignored, nothing else is."""
    labels = torch.arange(5).repeat_interleave(12).expand(45, 60).clone()  # smaller than the crop up to a scale of 1.07
    recipe = SemanticTrain(crop=(64, 64), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, fill=200)
    ignored, mirrored = set(), set()
    for found in crops(recipe, labels, 60):
        assert found.shape == (64, 64)
        rows, columns = (found != 255).nonzero().unbind(dim=1)
        inside = found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert bool((inside != 255).all())  # one rectangle of the image
        sizes = inside.shape
        assert sizes[0] == 64 or 22 <= sizes[0] <= 63
        assert sizes[1] == 64 or 30 <= sizes[1] <= 63
        steps = inside[0].diff().unique().tolist()
        assert steps in ([0, 1], [-1, 0])
        mirrored.add(steps[0])
        ignored.add(int((found == 255).sum()) > 0)
        assert share(found) <= 0.75
    assert mirrored == {0, -1} and ignored == {False, True}
