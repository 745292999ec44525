from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detseg
from detseg import visualize
from detseg.lettering import font_for, legend_strip
from detseg.structures import Detections, SemanticMap, Target

NAMES = ["apple", "pear", "orange"]
GREY = np.full((200, 240, 3), 100, np.uint8)


def found(*, masks: bool = False) -> Detections:
    boxes = torch.tensor([[20.0, 60.0, 80.0, 120.0], [120.0, 100.0, 180.0, 160.0]])
    drawn = torch.zeros((2, 200, 240), dtype=torch.bool)
    drawn[0, 60:120, 20:80] = True
    drawn[1, 100:160, 120:180] = True
    return Detections(
        boxes=boxes, scores=torch.tensor([0.9, 0.2]), labels=torch.tensor([0, 2]), masks=drawn if masks else None
    )


def test_boxes_lie_on_the_outermost_pixels() -> None:
    picture = visualize.draw_detections(GREY, found(), NAMES)
    assert picture.shape == GREY.shape and picture.dtype == np.uint8
    for x, y in ((20, 90), (79, 90), (50, 119)):
        np.testing.assert_array_equal(picture[y, x], visualize.colour(0))
    for x, y in ((19, 90), (80, 90), (50, 120), (50, 90)):
        np.testing.assert_array_equal(picture[y, x], 100)
    np.testing.assert_array_equal(picture[159, 150], visualize.colour(2))
    np.testing.assert_array_equal(GREY, 100)  # the image that was given stays as it was


def test_low_scores_are_left_out_and_the_best_lies_on_top() -> None:
    picture = visualize.draw_detections(GREY, found(), NAMES, min_score=0.5)
    np.testing.assert_array_equal(picture[90:, 100:], 100)
    same = Detections(
        boxes=torch.tensor([[20.0, 60, 80, 120]] * 2), scores=torch.tensor([0.3, 0.8]), labels=torch.tensor([0, 1])
    )
    np.testing.assert_array_equal(visualize.draw_detections(GREY, same)[90, 20], visualize.colour(1))


def test_masks_are_tinted_and_outlined() -> None:
    picture = visualize.draw_detections(GREY, found(masks=True), NAMES, opacity=0.5)
    middle = (100 + np.array(visualize.colour(0))) / 2
    np.testing.assert_allclose(picture[90, 50], middle, atol=1)
    np.testing.assert_array_equal(picture[30, 200], 100)
    clear = visualize.draw_detections(GREY, found(masks=True), NAMES, opacity=0.0)
    np.testing.assert_array_equal(clear[90, 50], 100)
    np.testing.assert_array_equal(clear[90, 20], visualize.colour(0))


def test_one_class_alone_has_a_colour_per_mask_and_no_captions_in_a_crowd() -> None:
    alike = Detections(**{**vars(found(masks=True)), "labels": torch.zeros(2, dtype=torch.int64)})
    picture = visualize.draw_detections(GREY, alike, ["nucleus"], opacity=0.0)
    np.testing.assert_array_equal(picture[90, 20], visualize.colour(0))
    np.testing.assert_array_equal(picture[130, 120], visualize.colour(1))
    few = Detections(boxes=alike.boxes[:1].repeat(12, 1), scores=torch.ones(12), labels=alike.labels[:1].repeat(12))
    many = Detections(boxes=alike.boxes[:1].repeat(13, 1), scores=torch.ones(13), labels=alike.labels[:1].repeat(13))
    assert (visualize.draw_detections(GREY, few, ["nucleus"])[:55] != 100).any()  # the caption above the box
    assert (visualize.draw_detections(GREY, many, ["nucleus"])[:55] == 100).all()
    assert (visualize.draw_detections(GREY, many, NAMES)[:55] != 100).any()  # of several classes the name matters


def test_crowds_are_hatched_and_named() -> None:
    one = found(masks=True)[0]
    target = Target(boxes=one.boxes, labels=one.labels, masks=one.masks, iscrowd=torch.tensor([True]))
    for truth in (target, Target(boxes=one.boxes, labels=one.labels, iscrowd=torch.tensor([True]))):
        inside = visualize.draw_target(GREY, truth, NAMES)[65:115, 25:75].reshape(-1, 3)
        plain = (inside == 100).all(axis=1).mean()
        assert 0.35 < plain < 0.65, "about half of the crowd's pixels are striped"
    whole = visualize.draw_target(GREY, Target(boxes=one.boxes, labels=one.labels, masks=one.masks), NAMES)
    assert not (whole[65:115, 25:75] == 100).all(axis=2).any()


def test_semantic_map_is_tinted_hatched_and_explained() -> None:
    labels = torch.zeros((200, 240), dtype=torch.int64)
    labels[100:] = 1
    labels[:, 200:] = 255
    picture = visualize.draw_semantic(GREY, SemanticMap(labels), NAMES, opacity=1.0)
    np.testing.assert_array_equal(picture[50, 50], visualize.colour(0))
    np.testing.assert_array_equal(picture[150, 50], visualize.colour(1))
    assert set(np.unique(picture[:200, 200:])) == {40, 230}, "pixels without a class are striped"
    assert picture.shape[0] > 200, "the legend lies below"
    legend = picture[200:].reshape(-1, 3)
    for label, shown in ((0, True), (1, True), (2, False)):
        assert (legend == visualize.colour(label)).all(axis=1).any() == shown
    bare = visualize.draw_semantic(GREY, SemanticMap(labels), NAMES, opacity=1.0, legend=False)
    np.testing.assert_array_equal(bare, picture[:200])
    target = Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels))
    np.testing.assert_array_equal(visualize.draw_target(GREY, target, NAMES)[:200].shape, GREY.shape)


def test_background_stays_clear() -> None:
    labels = torch.zeros((200, 240), dtype=torch.int64)
    labels[:, 100:] = 1
    picture = visualize.draw_semantic(GREY, SemanticMap(labels), ["background", "cell"], opacity=1.0)
    np.testing.assert_array_equal(picture[:200, :100], 100)
    np.testing.assert_array_equal(picture[100, 150], visualize.colour(1))
    assert not (picture[200:] == visualize.colour(0)).all(axis=2).any(), "nor does the legend name it"
    only = visualize.draw_semantic(GREY, SemanticMap(labels * 0), ["background", "cell"])
    np.testing.assert_array_equal(only[:200], GREY)


def test_legend_breaks_into_lines() -> None:
    entries = [(f"class number {k}", visualize.colour(k)) for k in range(12)]
    font = font_for(GREY)
    narrow, wide = legend_strip(entries, 160, font), legend_strip(entries, 3000, font)
    assert narrow.shape[1] == 160 and narrow.shape[0] > 6 * wide.shape[0]


def test_enlarged_pictures_keep_places() -> None:
    small = np.full((50, 60, 3), 100, np.uint8)
    mask = torch.zeros((1, 50, 60), dtype=torch.bool)
    mask[0, 20:40, 10:30] = True
    one = Detections(
        boxes=torch.tensor([[10.0, 20, 30, 40]]), scores=torch.ones(1), labels=torch.tensor([1]), masks=mask
    )
    picture = visualize.draw_detections(small, one, NAMES, scale=4)
    assert picture.shape == (200, 240, 3)
    np.testing.assert_array_equal(picture[159, 80], visualize.colour(1))
    np.testing.assert_array_equal(picture[100, 130], 100)
    assert (picture[120, 80] != 100).any(), "the mask grew with the image"
    assert visualize.draw(small, one, NAMES).shape == (350, 420, 3), "draw enlarges small images by itself"
    assert visualize.draw(small, one, NAMES, scale=1).shape == small.shape
    assert [visualize.legible_scale(*size) for size in ((128, 128), (320, 500), (1000, 200))] == [3, 1, 2]


def test_draw_takes_files_tensors_and_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (330, 340, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    empty = Detections.empty()
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), array, torch.from_numpy(array).permute(2, 0, 1)):
        np.testing.assert_array_equal(detseg.draw(image, empty), array)
    floats = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    np.testing.assert_array_equal(detseg.draw(floats, empty, path=tmp_path / "deep" / "out.png"), array)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "deep" / "out.png")), array)


def test_draw_turns_a_photo_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (400, 350)).save(tmp_path / "turned.jpg", exif=exif)
    assert detseg.draw(tmp_path / "turned.jpg", Detections.empty()).shape == (400, 350, 3)


def test_draw_chooses_by_what_was_found() -> None:
    semantic = SemanticMap(torch.ones((200, 240), dtype=torch.int64))
    assert detseg.draw(GREY, semantic, NAMES, scale=1).shape[0] > 200
    target = Target(boxes=found().boxes, labels=found().labels)
    np.testing.assert_array_equal(detseg.draw(GREY, target, NAMES, scale=1), visualize.draw_target(GREY, target, NAMES))
    np.testing.assert_array_equal(
        detseg.draw(GREY, found(), NAMES, scale=1), visualize.draw_detections(GREY, found(), NAMES, min_score=0.3)
    )


def test_captions_stay_inside_the_picture() -> None:
    corner = Detections(
        boxes=torch.tensor([[200.0, 0.0, 240.0, 40.0], [0.0, 190.0, 5.0, 200.0]]),
        scores=torch.tensor([1.0, 0.5]),
        labels=torch.tensor([0, 1]),
    )
    picture = visualize.draw_detections(GREY, corner, ["a long name of a class", "another"])
    written = (picture == visualize.colour(0)).all(axis=2)
    assert written[2:12, 120:200].any(), "moved left, so that it ends at the border"
    assert (picture == visualize.colour(1)).all(axis=2)[170:190, :30].any(), "above its box"


def test_side_by_side_and_contact_sheet() -> None:
    red, blue = np.zeros((40, 60, 3), np.uint8), np.zeros((50, 30, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    both = visualize.side_by_side(red, blue)
    bar = both.shape[0] - 50
    assert both.shape[1] == 60 + 4 + 30 and bar > 10
    np.testing.assert_array_equal(both[bar : bar + 40, :60], red)
    np.testing.assert_array_equal(both[bar:, 64:], blue)
    np.testing.assert_array_equal(both[bar + 40 :, :60], 255)
    sheet = visualize.contact_sheet([red, blue, red], columns=2, gap=2)
    assert sheet.shape == (102, 122, 3)
    np.testing.assert_array_equal(sheet[:50, 62:92], blue)
    np.testing.assert_array_equal(sheet[52:92, :60], red)
    assert visualize.contact_sheet([red] * 5).shape == (2 * 44 - 4, 3 * 64 - 4, 3)
    with pytest.raises(ValueError, match="no pictures"):
        visualize.contact_sheet([])


def test_palette_is_fixed_and_repeats() -> None:
    assert len(set(visualize.PALETTE)) == len(visualize.PALETTE) >= 14
    assert visualize.colour(3) == visualize.colour(3 + len(visualize.PALETTE)) == (240, 228, 66)


@pytest.mark.parametrize(
    ("image", "shown", "message"),
    [
        (GREY, Detections(torch.zeros((1, 4)), torch.ones(1), torch.tensor([3])), "label 3 has no name: there are 3"),
        (GREY, SemanticMap(torch.zeros((10, 10), dtype=torch.int64)), r"\(10, 10\), the image \(200, 240\)"),
        (GREY[:50], found(masks=True), r"mask has size \(200, 240\), the image \(50, 240\)"),
        (GREY[..., :1], found(), r"\(200, 240, 1\) uint8"),
        (GREY.astype(np.float32), found(), "float32"),
    ],
)
def test_errors_say_what_disagrees(image: np.ndarray, shown: visualize.Shown, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detseg.draw(image, shown, NAMES)
