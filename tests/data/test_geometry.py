from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2

from detseg.data.geometry import (
    UNLABELLED,
    LabelMask,
    ResizeAndCrop,
    Window,
    window_boxes,
    window_image,
    window_mask,
)

ZOOM = Window(start=(2, 4), span=(4, 8), shown=(8, 16), offset=(0, 0), canvas=(8, 16))
PASTE = Window(start=(0, 0), span=(6, 6), shown=(6, 6), offset=(1, 3), canvas=(9, 10))


def test_boxes_follow_the_window() -> None:
    boxes = torch.tensor([[4.0, 2.0, 12.0, 6.0], [0.0, 0.0, 6.0, 4.0]])
    assert window_boxes(boxes, ZOOM).tolist() == [[0, 0, 16, 8], [-8, -4, 4, 4]]
    assert window_boxes(boxes[1:], PASTE).tolist() == [[3, 1, 9, 5]]
    assert window_boxes(torch.zeros((0, 4)), ZOOM).shape == (0, 4)


def test_masks_take_the_nearest_pixel() -> None:
    mask = torch.zeros((1, 10, 14), dtype=torch.bool)
    mask[0, 3:5, 6:9] = True
    expected = torch.zeros((1, 8, 16), dtype=torch.bool)
    expected[0, 2:6, 4:10] = True
    assert_close(window_mask(mask, ZOOM), expected)
    labels = torch.arange(36).reshape(1, 6, 6)
    pasted = window_mask(labels, PASTE, fill=UNLABELLED)
    assert_close(pasted[0, 1:7, 3:9], labels[0])
    assert int((pasted == UNLABELLED).sum()) == 9 * 10 - 36
    half = Window(start=(0, 0), span=(6, 6), shown=(2, 3), offset=(0, 0), canvas=(2, 3))
    assert window_mask(labels, half)[0].tolist() == [[7, 9, 11], [25, 27, 29]]  # rows 1, 4; columns 1, 3, 5


@pytest.mark.parametrize("size", [(5, 7), (24, 40)])
def test_nearest_agrees_with_torch(size: tuple[int, int]) -> None:
    values = torch.randint(0, 250, (2, 12, 20), dtype=torch.uint8)
    window = Window(start=(0, 0), span=(12, 20), shown=size, offset=(0, 0), canvas=size)
    expected = torch.nn.functional.interpolate(values[None], size=size, mode="nearest-exact")[0]
    assert_close(window_mask(values, window), expected)


def test_image_and_boxes_stay_aligned() -> None:
    image = torch.zeros((3, 40, 60), dtype=torch.uint8)
    image[:, 10:20, 30:42] = 255
    window = Window(start=(5, 20), span=(30, 30), shown=(60, 90), offset=(3, 4), canvas=(70, 100))
    seen = window_image(image, window, fill=7)
    assert seen.shape == (3, 70, 100) and seen.dtype == torch.uint8
    assert int(seen[0, 0, 0]) == 7 and int(seen[0, 69, 99]) == 7
    rows, columns = (seen[0] > 127).nonzero().unbind(dim=1)
    box = window_boxes(torch.tensor([[30.0, 10.0, 42.0, 20.0]]), window)[0].tolist()
    found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert box == [34.0, 13.0, 70.0, 33.0]
    assert max(abs(one - other) for one, other in zip(box, found, strict=True)) <= 1  # bilinear edges


@pytest.mark.parametrize(
    ("arguments", "size", "fitted"),
    [
        ({"size": (240, 320)}, (480, 640), (240, 320)),
        ({"size": (100, 100)}, (50, 200), (100, 100)),
        ({"short_side": 100}, (200, 300), (100, 150)),
        ({"short_side": 100, "long_side": 120}, (200, 300), (80, 120)),
        ({"long_side": 150}, (200, 300), (100, 150)),
        ({}, (33, 44), (33, 44)),
    ],
)
def test_fit(arguments: dict[str, object], size: tuple[int, int], fitted: tuple[float, float]) -> None:
    assert ResizeAndCrop(**arguments).fit(size) == pytest.approx(fitted)  # type: ignore[arg-type]


def run(step: v2.Transform, height: int = 40, width: int = 60) -> dict[str, torch.Tensor]:
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[0.0, 0.0, 60.0, 40.0]]), format="XYXY", canvas_size=(height, width), clamping_mode=None
    )
    whole = torch.ones((1, height, width), dtype=torch.int64)
    image = tv_tensors.Image(torch.full((3, height, width), 200, dtype=torch.uint8))
    return step({"image": image, "boxes": boxes, "mask": tv_tensors.Mask(whole), "labels": LabelMask(whole)})


def test_jitter_keeps_the_canvas_and_everything_aligned() -> None:
    step = ResizeAndCrop(size=(80, 120), scale=(0.3, 2.5), fill=0)
    spans = set()
    for _ in range(30):
        parts = run(step)
        assert all(parts[name].shape[-2:] == (80, 120) for name in ("image", "mask", "labels"))
        x1, y1, x2, y2 = parts["boxes"][0].tolist()
        spans.add(round(x2 - x1))
        left, top, right, bottom = (max(0, round(x1)), max(0, round(y1)), min(120, round(x2)), min(80, round(y2)))
        covered = (right - left) * (bottom - top)
        for name in ("mask", "image"):
            assert int((parts[name][0] > 0).sum()) == covered
        assert int((parts["labels"] == 1).sum()) == covered
        assert int((parts["labels"] == UNLABELLED).sum()) == 80 * 120 - covered
    assert min(spans) < 60 and max(spans) > 200  # both smaller and larger than the canvas


def test_without_a_fixed_size_the_result_never_outgrows_the_resized_image() -> None:
    shapes = {tuple(run(ResizeAndCrop(short_side=20, scale=(0.5, 2.0)))["image"].shape[-2:]) for _ in range(20)}
    assert max(shapes) == (20, 30) and min(shapes)[0] < 20
    assert run(ResizeAndCrop(crop=(32, 96)))["image"].shape == (3, 32, 96)  # cut in height, filled in width


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be .* got \(2.0, 1.0\)"):
        ResizeAndCrop(scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="one or the other"):
        ResizeAndCrop(size=(4, 4), short_side=3)
    with pytest.raises(ValueError, match="crop must be"):
        ResizeAndCrop(crop=(0, 4))
