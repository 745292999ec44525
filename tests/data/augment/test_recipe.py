from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.data.augment import Augment, Context, Scene
from detseg.data.split import TransformedSplit, seeded
from detseg.data.transforms import DetectionTrain, Recipe
from detseg.structures import Target
from planted import BLACK, PER_IMAGE, Planted, PlantedData, colour, context, crowd, difficult, everything

RECIPES: dict[str, dict[str, Any]] = {
    "zoom out": {"zoom_out": 1.0},
    "iou crop": {"iou_crop": 1.0},
    "ssd's geometry": {"zoom_out": 0.5, "iou_crop": 1.0},
    "mosaic": {"mosaic": 1.0},
    "copy-paste": {"copy_paste": 1.0},
    "mosaic with pasted objects": {"mosaic": 1.0, "copy_paste": 1.0, "zoom_out": 0.3, "iou_crop": 0.3},
    "multi-scale": {"multi_scale": [0.5, 1.3, [20, 70]], "multi_scale_every": 1},
}
SIZES: dict[str, dict[str, Any]] = {
    "own size": {},
    "stretched": {"size": (40, 56)},
    "short side": {"short_side": 40, "long_side": 60},
    "window": {"crop": (44, 44)},
    "large scale jitter": {"size": (48, 48), "scale": (0.1, 2.0)},
}


def split_of(augment: dict[str, Any], sizes: dict[str, Any], samples: Planted) -> TransformedSplit:
    return TransformedSplit(samples=samples, transform=DetectionTrain(augment=Augment(**augment), **sizes), seed=7)


def check_boxes(image: Tensor, target: Target) -> None:
    """Every box lies in the image and has an area; what is told by the label is true of the rest of its row."""
    height, width = image.shape[-2:]
    assert target.size == (height, width) and image.dtype == torch.uint8
    assert bool((target.boxes >= 0).all())
    assert bool((target.boxes[:, 2] <= width).all()) and bool((target.boxes[:, 3] <= height).all())
    assert bool((target.boxes[:, 2:] - target.boxes[:, :2] >= 1).all())
    assert_close(target.iscrowd, crowd(target.labels))
    assert_close(target.difficult, difficult(target.labels))
    assert bool((target.area > 0).all())


def check_masks(image: Tensor, target: Target) -> None:
    """The box is that of the mask, within a pixel, and the mask lies where the object's colour is."""
    assert target.masks is not None and target.masks.shape[1:] == image.shape[-2:]
    pixels = target.masks.flatten(1).sum(dim=1)  # an area is cut as the box is, and an ellipse otherwise
    ratio = (target.area / pixels)[pixels >= 60]
    assert bool(((ratio > 0.5) & (ratio < 2)).all())
    for box, mask, label in zip(target.boxes, target.masks, target.labels.tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(dim=1)
        around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        small = float((box[2:] - box[:2]).min()) < 8  # the pointed end of an ellipse may fall between two pixels
        assert float((around - box).abs().max()) <= (2.0 if small else 1.0), (around, box)
        wanted = torch.tensor(colour(label))
        right = (image[:, mask].int() - wanted[:, None]).abs().amax(dim=0) <= 40
        assert int(mask.sum()) < 30 or float(right.float().mean()) > 0.3, label  # small ones are blurred


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("augment", RECIPES)
def test_objects_stay_whole_whatever_happens(augment: str, sizes: str) -> None:
    samples = Planted()
    split = split_of(RECIPES[augment], SIZES[sizes], samples)
    seen, objects = set(), 0
    for number in range(28):
        image, target, _ = split[number // 14, number % 14, number]
        check_boxes(image, target)
        check_masks(image, target)
        assert target.image_id == number % 14 and target.file == f"planted/{number % 14}"
        seen |= {label // PER_IMAGE for label in target.labels.tolist()}
        objects += len(target)
    assert objects > 30 and len(seen) >= 8


@pytest.mark.parametrize("augment", [{"mixup": 1.0}, {"mosaic": 0.5, "mixup": 0.5, "zoom_out": 0.5, "iou_crop": 0.5}])
def test_boxes_without_masks_and_proposals_stay_in_step(augment: dict[str, Any]) -> None:
    samples = Planted(masks=False, proposals=True)
    split = split_of(augment, {"size": (40, 56), "scale": (0.5, 1.5), "min_visible": 0.0}, samples)
    for number in range(42):
        image, target, _ = split[number // 14, number % 14]
        check_boxes(image, target)
        proposals = target.proposals
        assert target.masks is None and proposals is not None
        assert bool((proposals >= 0).all()) and bool((proposals[:, 2:] <= torch.tensor([56, 40])).all())
        assert bool((proposals[:, 2:] - proposals[:, :2] >= 1).all())
        near = (target.boxes[:, None] - proposals[None]).abs().amax(dim=-1)  # an object's box is among them
        assert not len(target) or float(near.amin(dim=1).max()) < 1e-3


def test_mixup_shows_the_objects_of_both_images() -> None:
    samples = Planted()
    split = split_of({"mixup": 1.0}, {"size": (40, 56), "flip": 0.0}, samples)
    counts = set()
    for index in range(14):
        _, target, _ = split[index]
        images = {label // PER_IMAGE for label in target.labels.tolist()}
        counts.add(len(images))
        assert len(images) <= 2 and (index in images or not len(samples[index].target))
    assert counts >= {1, 2}


@pytest.mark.parametrize("augment", [{"iou_crop": 1.0}, {"mosaic": 1.0, "mosaic_scale": [1.0, 1.5]}, {"zoom_out": 1.0}])
def test_what_shows_of_a_crowd_stays_one_in_every_crop(augment: dict[str, Any]) -> None:
    """An image of 64 x 64 that is one crowd but for a small object; what is grey is fill."""
    boxes = torch.tensor([[0.0, 0, 64, 64], [40, 40, 52, 52]])
    target = Target(boxes=boxes, labels=torch.tensor([0, 1]), iscrowd=torch.tensor([True, False]), size=(64, 64))
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    recipe = DetectionTrain(size=(48, 48), scale=(1.0, 3.0), flip=0.5, fill=0, augment=Augment(**augment))
    for seed in range(60):
        torch.manual_seed(seed)
        seen, found = recipe(image, target, Context(images=1, read=lambda _: (image, target), batch=seed))
        bare = (seen[0] == 200).clone()
        for x1, y1, x2, y2 in found.boxes[found.iscrowd].tolist():
            bare[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = False
        assert int(bare.sum()) == 0


def test_an_empty_or_single_image_is_enough() -> None:
    empty = Planted(4)
    for recipe in (everything(mixup=0.5), everything(mosaic=1.0, copy_paste=1.0)):
        for number in range(12):  # image 3 is empty; others may be drawn to it
            image, target = recipe(*empty[3][:2], Context(images=1, read=lambda _: empty[3][:2], batch=number))
            assert len(target) == 0 and target.boxes.shape == (0, 4) and image.shape[0] == 3
            assert target.masks is not None and target.masks.shape == (0, *image.shape[-2:])
    single = TransformedSplit(samples=Planted(1), transform=everything(mosaic=1.0), seed=1)
    for epoch in range(20):
        image, target, _ = single[epoch, 0]
        check_boxes(image, target)
        assert all(label < PER_IMAGE for label in target.labels.tolist())


def test_semantic_maps_follow_in_what_has_a_meaning_for_them() -> None:
    samples = Planted(masks=True, semantic=True)
    recipe = DetectionTrain(size=(40, 56), flip=0.5, fill=255, augment=Augment(mosaic=0.5, zoom_out=0.5, iou_crop=0.5))
    split = TransformedSplit(samples=samples, transform=recipe, seed=2)
    for number in range(28):
        image, target, _ = split[number // 14, number % 14]
        assert target.semantic is not None and target.semantic.labels.shape == image.shape[-2:]
        labels = target.semantic.labels
        assert bool((image[:, labels == 255] == 255).float().mean() > 0.9) or not (labels == 255).any()
        black = (image < BLACK).all(dim=0)
        assert bool((labels[black] == 0).float().mean() > 0.9) or not black.any()
        assert target.masks is not None
        for mask, label in zip(target.masks, target.labels.tolist(), strict=True):
            assert bool((labels[mask] == label + 1).all())


def test_copy_paste_leaves_crowds_and_keeps_masks_apart() -> None:
    split = split_of({"copy_paste": 1.0, "copy_paste_share": 1.0}, {"size": (48, 64)}, Planted())
    pasted = 0
    for index in range(14):
        _, target, _ = split[index]
        assert target.masks is not None and int(target.masks.sum(dim=0).max() if len(target) else 0) <= 1
        strange = target.labels // PER_IMAGE != index
        pasted += int(strange.sum())
        assert not bool(target.iscrowd[strange].any())
    assert pasted > 14


def test_what_is_off_changes_nothing() -> None:
    """A recipe whose augmentations are all off draws the same numbers as one without any."""
    samples = Planted()
    for index in range(7):
        with seeded(1, index):
            image, target = DetectionTrain(size=(30, 40), scale=(0.5, 2.0))(*samples[index][:2])
        with seeded(1, index):
            other, same = DetectionTrain(size=(30, 40), scale=(0.5, 2.0), augment=Augment())(
                *samples[index][:2], context(samples)
            )
        assert_close(other, image)
        assert_close(same.boxes, target.boxes)
    assert Recipe(augment=Augment()).augment is None and Recipe(augment=Augment(mosaic=0.1)).augment is not None
    assert not Augment(close_epochs=3).active


def test_heavy_augmentation_closes_for_the_last_epochs() -> None:
    samples = Planted()

    def read(other: int) -> Scene:
        raise AssertionError(f"image {other} was read")

    recipe = everything(mosaic=1.0, close_epochs=2)
    for epoch in range(5):
        open_ = Context(images=14, read=read, epoch=epoch, epochs=5)
        if epoch < 3:
            with pytest.raises(AssertionError, match="was read"):
                recipe(*samples[0][:2], open_)
        else:
            assert {label // PER_IMAGE for label in recipe(*samples[0][:2], open_)[1].labels.tolist()} <= {0}
    with pytest.raises(AssertionError, match="was read"):  # no end is known
        recipe(*samples[0][:2], Context(images=14, read=read, epoch=99))
    everything(mosaic=1.0, close_epochs=9)(*samples[0][:2], Context(images=14, read=read, epochs=5))


def test_a_size_is_drawn_for_a_batch() -> None:
    recipe = DetectionTrain(size=(32, 48), augment=Augment(multi_scale=[0.5, 1.5, [20, 30]], multi_scale_every=2))
    samples, seen = Planted(), []
    for batch in range(12):
        sizes = {tuple(recipe(*samples[i][:2], context(samples, batch=batch))[0].shape[1:]) for i in range(7)}
        assert len(sizes) == 1
        seen += sizes
    assert set(seen) == {(16, 24), (48, 72), (20, 30)} and seen[::2] == seen[1::2]


def test_shape_is_kept_by_factors_of_other_sizes() -> None:
    for sizes, expected in (
        ({}, (24, 32)), ({"short_side": 96}, (48, 64)), ({"long_side": 32}, (12, 16)), ({"crop": (60, 30)}, (30, 15)),
    ):  # fmt: skip
        recipe = DetectionTrain(augment=Augment(multi_scale=[0.5]), **sizes)
        image, _ = recipe(*Planted()[0][:2], context(Planted()))
        assert tuple(image.shape[1:]) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_seed_epoch_and_index_alone(workers: int) -> None:
    def batches(skip: int, epochs: list[int], workers: int) -> list[Any]:
        loader = PlantedData(train_transform=everything(), num_workers=workers).train_dataloader()
        loader.load_state_dict({"batch": skip, "epoch": epochs[0]})  # type: ignore[attr-defined]
        found = []
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            found.append(list(loader))
        return found

    first, second = batches(0, [0, 1], 0)
    if workers:
        for epoch, again in zip((first, second), batches(0, [0, 1], workers), strict=True):
            assert_same(again, epoch)
    (rest,) = batches(3, [1], workers)
    assert len(second) == 7 and len(rest) == 4
    assert_same(rest, second[3:])
    assert len({tuple(batch.images.shape) for batch in first + second}) > 1  # sizes were drawn


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one.images, other.images, rtol=0, atol=0)
        for mine, theirs in zip(one.targets, other.targets, strict=True):
            for name in ("boxes", "labels", "masks", "area", "iscrowd", "difficult"):
                assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=0)


def test_all_processes_have_the_same_size_at_the_same_time() -> None:
    shapes = []
    for rank in range(2):
        data = PlantedData(train_transform=everything(multi_scale=[1.0, 2.0, 3.0]), count=24)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})()  # type: ignore[assignment]
        shapes.append([tuple(batch.sizes[0].tolist()) for batch in data.train_dataloader()])
    assert shapes[0] == shapes[1] and len(set(shapes[0])) > 1


def test_what_reading_draws_changes_nothing_else() -> None:
    class Noisy(Planted):
        draws = 0

        def __getitem__(self, index: int) -> Any:
            torch.rand(Noisy.draws)
            return super().__getitem__(index)

    split = TransformedSplit(samples=Noisy(), transform=everything(mosaic=1.0), seed=3)
    first = split[2, 5].image
    Noisy.draws = 9
    assert_close(split[2, 5].image, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mosaic": 1.5}, r"augment.mosaic is a probability, 0 to 1, got 1.5"),
        ({"copy_paste_share": -1}, "copy_paste_share is a probability"),
        ({"zoom_out_max": 0.5}, "zoom_out_max=0.5 must be at least 1"),
        ({"mixup_alpha": 0.0}, "mixup_alpha=0.0 above 0"),
        ({"iou_crop_overlaps": []}, r"iou_crop_overlaps=\[\] not empty"),
        ({"mosaic_scale": [2.0, 1.0]}, r"mosaic_scale must be \[lowest, highest\].*got \[2.0, 1.0\]"),
        ({"mosaic_centre": [0.5, 1.2]}, "mosaic_centre must be .* <= 1"),
        ({"close_epochs": -1}, "close_epochs=-1 must be at least 0"),
        ({"multi_scale_every": 0}, "multi_scale_every=0 at least 1"),
        ({"multi_scale": [0.5, -1.0]}, "a factor of the image size must be positive, got -1.0"),
        ({"multi_scale": [[0, 32]]}, "size must be"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)


def test_what_has_no_meaning_for_the_truth_is_an_error_before_anything_is_read() -> None:
    for truth in ("boxes", "semantic"):
        with pytest.raises(ValueError, match=f"augment.copy_paste=0.5 .* truth is {truth}: give truth=instances"):
            PlantedData(truth=truth, train_transform=Recipe(augment=Augment(copy_paste=0.5)))
    with pytest.raises(ValueError, match=r"augment.mixup=1.0 .* truth is semantic"):
        PlantedData(truth="semantic", train_transform=Recipe(augment=Augment(mixup=1.0)))
    assert PlantedData(truth="semantic", train_transform=Recipe(augment=Augment(mosaic=1.0))).truth == "semantic"
