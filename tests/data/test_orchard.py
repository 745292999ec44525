from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import masks_to_boxes

from detseg.data import Orchard
from detseg.data.check import DataError
from detseg.data.orchard import OrchardDataset
from detseg.data.orchard_draw import EMPTY_SHARE, MIN_VISIBLE, draw_scene, paint_fruits
from detseg.data.orchard_fruit import SPECIES, Fruit, draw_fruit, hsv, pick, plan_fruit, random_turn

# Recorded with numpy 2.4 on x86-64. Another machine must draw the same bytes; a change of the drawing changes them all.
CHECKSUMS = {
    (0, 0, 0, 128, 128): "3f6476aa0a79c54d",
    (0, 1, 7, 128, 128): "fa110ca8cfdec092",
    (3, 2, 11, 96, 160): "92defdb4f7ee8bf8",
    (0, 0, 5, 320, 320): "3f21df3f9415492c",
}


def digest(seed: int, split: int, index: int, height: int, width: int) -> str:
    scene = draw_scene(seed=seed, split=split, index=index, size=(height, width))
    parts = (scene.image, scene.segments, scene.semantic, scene.labels.astype("<i8"))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


@pytest.mark.parametrize("key", CHECKSUMS)
def test_the_same_bytes_on_every_machine(key: tuple[int, int, int, int, int]) -> None:
    assert digest(*key) == CHECKSUMS[key]


def test_seed_split_and_index_each_change_the_scene() -> None:
    scenes = {digest(seed, split, index, 64, 64) for seed in (0, 1) for split in (0, 1, 2) for index in (0, 1)}
    assert len(scenes) == 12


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    drawn = (draw_scene(seed=0, split=0, index=index, size=(128, 128)) for index in range(400))
    return [(scene.segments, scene.semantic, scene.labels) for scene in drawn]


def test_counts_kinds_and_sizes_of_fruit(scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    counts = np.array([len(labels) for _, _, labels in scenes])
    assert 0.02 <= (counts == 0).mean() <= 0.09, f"one in twenty is empty, drawn with probability {EMPTY_SHARE}"
    assert counts.max() == 8 and 3 <= counts.mean() <= 4.5
    kinds = np.bincount(np.concatenate([labels for _, _, labels in scenes]), minlength=3)
    assert kinds.min() > 0.28 * kinds.sum()
    sides = []
    for segments, _, labels in scenes:
        for number in range(1, len(labels) + 1):
            rows, columns = np.nonzero(segments == number)
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(sides) >= 6 and 14 <= np.quantile(sides, 0.02) <= 18 and 50 <= max(sides) <= 75
    assert np.quantile(sides, 0.9) > 2.3 * np.quantile(sides, 0.1), "fruit comes in many sizes"


def test_semantic_map_agrees_with_segments(scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    for segments, semantic, labels in scenes[:100]:
        assert set(np.unique(segments)) <= set(range(len(labels) + 1))
        for number, label in enumerate(labels, start=1):
            assert (segments == number).any(), "a listed fruit shows"
            assert (semantic[segments == number] == label + 2).all()
        assert (semantic[segments == 0] <= 1).all()
        assert (semantic[0][segments[0] == 0] == 0).all(), "the top row is sky"
        assert (semantic[-1][segments[-1] == 0] == 1).all(), "the bottom row is grass"


def orange(x: float, radius: float) -> Fruit:
    return plan_fruit(np.random.default_rng(0), species=2, x=x, y=0.5, radius=radius)


def paint(*fruits: Fruit) -> tuple[np.ndarray, np.ndarray]:
    canvas, skyline = np.zeros((3, 200, 200), np.float32), np.zeros((200, 200), np.float32)
    return paint_fruits(list(fruits), canvas, skyline, (0.0, 0.0, 1.0))


def test_fruit_in_front_hides_what_is_behind() -> None:
    alone, _ = paint(orange(0.4, 0.1))
    whole = int((alone > 0).sum())
    np.testing.assert_allclose(whole, np.pi * (0.95 * 0.1 * 200) ** 2, rtol=0.02)  # a disc of 0.95 radii
    segments, labels = paint(orange(0.4, 0.1), orange(0.5, 0.1))  # farthest first: the second is in front
    assert labels.tolist() == [2, 2] and int((segments == 2).sum()) == whole
    # Two equal discs, centres 20 px apart, radii 19 px: the lens that both cover.
    r, d = 19.0, 20.0
    lens = 2 * r * r * np.arccos(d / (2 * r)) - d / 2 * np.sqrt(4 * r * r - d * d)
    np.testing.assert_allclose(int((segments == 1).sum()), whole - lens, rtol=0.03)


def test_fruit_that_hardly_shows_is_left_out() -> None:
    for x, kept in ((0.5, 1), (0.55, 1), (0.58, 1), (0.64, 2), (0.9, 2)):
        segments, labels = paint(orange(x, 0.08), orange(0.5, 0.16))
        assert len(labels) == kept, f"a small orange at {x} behind a large one at 0.5"
        assert int(segments.max()) == kept
    assert MIN_VISIBLE == 0.25
    assert len(paint(orange(-0.05, 0.1))[1]) == 0, "most of it lies beyond the border"
    assert len(paint(orange(0.01, 0.1))[1]) == 1


def test_occlusion_occurs() -> None:
    # A fruit in front removes pixels from one behind: the box of the hidden one then overlaps the front one's.
    overlaps = 0
    for index in range(60):
        target = OrchardDataset(split="train", images=60, truth="instances", cache_mb=0).target(index)
        assert target.masks is not None
        assert not bool((target.masks.sum(dim=0) > 1).any()), "each pixel belongs to one fruit"
        boxes = target.boxes
        wide = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(
            boxes[:, None, :2], boxes[None, :, :2]
        )
        overlaps += int((wide.clamp(min=0).prod(dim=2) > 0).sum() - len(boxes)) // 2
    assert overlaps > 20


@pytest.mark.parametrize("species", range(3))
def test_shapes_differ_without_colour(species: int) -> None:
    fruit = plan_fruit(np.random.default_rng(1), species=species, x=0.5, y=0.5, radius=0.2)
    alpha = draw_fruit(fruit, radius=40.0, centre=(60.0, 60.0), size=120, light=(0.0, 0.0, 1.0))[1]
    rows, columns = np.nonzero(alpha >= 0.5)
    disc = np.pi * 40 * 40 / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
    share = len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
    expected = {"orange": (0.77, 0.80), "apple": (0.45, 0.75), "pear": (0.30, 0.70)}[SPECIES[species]]
    assert expected[0] <= share <= expected[1], (
        f"{SPECIES[species]} fills {share:.3f} of its box (a disc of it {disc:.3f})"
    )


def test_hues_overlap_between_species() -> None:
    def hues(species: int) -> set[int]:
        rng, found = np.random.default_rng(0), set()
        for _ in range(400):
            red, green, blue = plan_fruit(rng, species=species, x=0, y=0, radius=0.1).colours[0]
            found.add(int(np.arctan2(1.732 * (green - blue), 2 * red - green - blue) * 12 / np.pi))
        return found

    apple, pear, orange = (hues(species) for species in range(3))
    assert len(apple & pear) >= 5 and len(apple & orange) >= 4 and len(pear & orange) >= 4


@pytest.mark.parametrize("truth", ["boxes", "instances", "semantic", "panoptic"])
def test_truths_of_one_scene_agree(truth: str) -> None:
    dataset = OrchardDataset(split="val", images=12, truth=truth)
    whole = OrchardDataset(split="val", images=12, truth="panoptic")
    for index in range(12):
        image, target, truths = dataset[index]
        full = whole.target(index)
        assert truths is None and target.image_id == index and target.size == (128, 128)
        torch.testing.assert_close(image, whole[index].image, rtol=0, atol=0)
        torch.testing.assert_close(target.boxes, full.boxes)
        assert (target.masks is not None) == (truth in ("instances", "panoptic"))
        assert (target.semantic is not None) == (truth in ("semantic", "panoptic"))
        assert full.masks is not None and full.panoptic is not None and full.semantic is not None
        torch.testing.assert_close(target.area, full.masks.flatten(1).sum(dim=1).float())
        if len(full):
            torch.testing.assert_close(full.boxes, masks_to_boxes(full.masks) + torch.tensor([0.0, 0, 1, 1]))
        panoptic = full.panoptic
        assert int(panoptic.segments.min()) >= 1, "no pixel is void"
        torch.testing.assert_close(panoptic.labels[panoptic.segments - 1], full.semantic.labels)
        assert panoptic.is_thing.tolist() == [True] * len(full) + [False] * (len(panoptic.labels) - len(full))


def test_empty_images_are_whole_samples() -> None:
    dataset = OrchardDataset(split="train", images=200, truth="panoptic")
    empty = [index for index in range(200) if len(dataset.scene(index).labels) == 0]
    assert 4 <= len(empty) <= 18
    target = dataset.target(empty[0])
    assert target.boxes.shape == (0, 4) and target.masks is not None and target.masks.shape == (0, 128, 128)
    assert target.panoptic is not None and target.panoptic.labels.tolist() == [0, 1]


@settings(max_examples=15, deadline=None)
@given(height=st.integers(16, 150), width=st.integers(16, 150), index=st.integers(0, 500))
def test_any_size_can_be_drawn(height: int, width: int, index: int) -> None:
    scene = draw_scene(seed=1, split=0, index=index, size=(height, width))
    assert scene.image.shape == (3, height, width) and scene.image.dtype == np.uint8
    assert scene.segments.shape == scene.semantic.shape == (height, width)
    assert int(scene.segments.max()) == len(scene.labels)
    assert scene.image.std() > 5


def test_an_index_shows_the_same_orchard_at_every_size() -> None:
    for index in range(6):
        small = OrchardDataset(split="train", images=6, image_size=128).target(index)
        large = OrchardDataset(split="train", images=6, image_size=256).target(index)
        assert small.labels.tolist() == large.labels.tolist()
        torch.testing.assert_close(small.boxes * 2, large.boxes, atol=6.0, rtol=0)


def test_cache_gives_the_same_images_and_is_bounded() -> None:
    kept = OrchardDataset(split="train", images=8, image_size=64, cache_mb=0.07)  # room for three
    fresh = OrchardDataset(split="train", images=8, image_size=64, cache_mb=0)
    for index in [*range(8), *range(8)]:
        sample = kept[index]
        torch.testing.assert_close(sample.image, fresh[index].image, rtol=0, atol=0)
        sample.image.zero_()  # what a user does to a sample must not reach the cache
    assert len(kept._cache) == 3 and len(fresh._cache) == 0


def test_data_module_counts_classes_by_truth() -> None:
    fruit = Orchard(train_images=4, val_images=2, num_workers=0, batch_size=2)
    assert (fruit.num_classes, fruit.class_names, fruit.category_ids) == (3, list(SPECIES), [2, 3, 4])
    pixels = Orchard(truth="semantic", train_images=4, val_images=2, num_workers=0, batch_size=2)
    assert pixels.class_names == ["sky", "grass", "apple", "pear", "orange"]
    with pytest.raises(DataError, match=r"5.*3|3.*5"):
        Orchard(num_classes=5, num_workers=0).setup("fit")


def test_data_module_gives_batches_of_the_dataset() -> None:
    data = Orchard(
        truth="instances", image_size=(96, 128), train_images=6, val_images=3, num_workers=0, batch_size=2, seed=4
    )
    data.setup("fit")
    seen = [target.image_id for batch in data.train_dataloader() for target in batch.targets]
    assert sorted(seen) == list(range(6)) and seen != sorted(seen)
    batch = next(iter(data.val_dataloader()))
    first = OrchardDataset(split="val", images=3, image_size=(96, 128), truth="instances", seed=4)[0]
    torch.testing.assert_close(batch.images[0], first.image.as_subclass(torch.Tensor), rtol=0, atol=0)
    assert batch.targets[0].masks is not None and batch.targets[0].masks.shape[1:] == (96, 128)
    assert next(len(batch) for batch in data.test_dataloader()) == 2 and len(data.dataset("test")) == 200


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "dev.*train, val, test"),
        ({"truth": "depth"}, "depth.*boxes, instances"),
        ({"images": 0}, "images=0.*at least 1"),
        ({"image_size": 8}, r"\(8, 8\).*16 px"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_errors_name_the_remedy(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrchardDataset(**({"split": "train", "images": 2} | wrong))  # type: ignore[arg-type]


def test_an_index_outside_the_split_is_refused() -> None:
    dataset = OrchardDataset(split="train", images=2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            dataset[index]
    assert len(dataset) == 2


def test_helpers_of_the_drawing() -> None:
    rng = np.random.default_rng(0)
    for upright in (True, False):
        turns = np.array([random_turn(rng, upright=upright) for _ in range(200)])
        np.testing.assert_allclose((turns**2).sum(axis=1), 1, atol=1e-12)
        assert (turns[:, 0].min() > 0.7) == upright
    counts = np.bincount([pick(rng, (0.1, 0.6, 0.3)) for _ in range(2000)]) / 2000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.05)
    np.testing.assert_array_equal(hsv(1.0, 1.0, 1.0), [255, 0, 0])
