from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from detseg.data.augment.framing import Frame, centred, iou_crop, through, zoom_out
from detseg.data.geometry import Place, ResizeAndCrop, Window, window_boxes, window_image, window_mask

BOXES = torch.tensor([[5.0, 5, 25, 30], [40, 10, 60, 20], [30, 30, 70, 48]])
ALL = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def edges(frame: Frame) -> Tensor:
    (top, left), (height, width) = frame
    return torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)


def test_zoom_out_draws_torchvisions_canvas() -> None:
    theirs = v2.RandomZoomOut(side_range=(1.0, 4.0), p=1.0)
    image = tv_tensors.Image(torch.zeros((3, 48, 80), dtype=torch.uint8))
    for seed in range(50):
        torch.manual_seed(seed)
        left, top, right, bottom = theirs.make_params([image])["padding"]
        torch.manual_seed(seed)
        frame = zoom_out(Frame((0, 0), (48, 80)), 4.0)
        found = [-frame.start[1], -frame.start[0], frame.size[1], frame.size[0]]
        expected = [left, top, left + 80 + right, top + 48 + bottom]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1  # theirs counts in float32


@pytest.mark.parametrize("demand", [0.0, 0.1, 0.5, 0.7])
def test_a_patch_meets_its_demand_with_an_object_that_stays(demand: float) -> None:
    cuts = 0
    for seed in range(60):
        torch.manual_seed(seed)
        frame, cut = iou_crop(Frame((0, 0), (50, 80)), BOXES, [demand])
        cuts += cut
        if not cut:
            assert frame == Frame((0, 0), (50, 80))
            continue
        (top, left), (height, width) = frame
        assert 0 <= top <= top + height <= 50 and 0 <= left <= left + width <= 80
        assert height >= 15 and width >= 24 and 0.5 <= width / height <= 2.0  # at least 0.3 of each side
        kept = centred(BOXES, frame)
        assert bool(kept.any()) and float(box_iou(edges(frame), BOXES[kept]).max()) >= demand
    assert cuts > (50 if demand < 0.5 else 20)


def test_patches_are_spread_as_torchvisions() -> None:
    """Over 400 draws of each: how often an image stays whole, and how large patches are on average."""
    theirs = v2.RandomIoUCrop()
    image = tv_tensors.Image(torch.zeros((3, 50, 80), dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(50, 80))
    torch.manual_seed(1)
    ours = [iou_crop(Frame((0, 0), (50, 80)), BOXES, ALL) for _ in range(400)]
    params = [theirs.make_params([image, boxes]) for _ in range(400)]
    whole = [sum(not cut for _, cut in ours) / 400, sum(not drawn for drawn in params) / 400]
    areas = [
        torch.tensor([frame.size[0] * frame.size[1] / 4000 for frame, cut in ours if cut]),
        torch.tensor([drawn["height"] * drawn["width"] / 4000 for drawn in params if drawn]),
    ]
    assert abs(whole[0] - whole[1]) < 0.1  # three standard deviations
    assert abs(float(areas[0].mean() - areas[1].mean())) < 0.05 and abs(float(areas[0].std() - areas[1].std())) < 0.05


def test_an_image_without_objects_and_the_smallest_ones_end() -> None:
    none = torch.zeros((0, 4))
    for seed in range(20):
        torch.manual_seed(seed)
        frame, cut = iou_crop(Frame((0, 0), (50, 80)), none, [0.9])
        assert cut and frame.size != (50, 80)
        tiny, _ = iou_crop(Frame((0, 0), (1, 1)), torch.tensor([[0.0, 0, 1, 1]]), ALL)
        assert tiny == Frame((0, 0), (1, 1))
    assert iou_crop(Frame((0, 0), (50, 80)), BOXES, [1.0]) == (Frame((0, 0), (50, 80)), False)
    assert iou_crop(Frame((0, 0), (4, 400)), BOXES[:1], [0.95]) == (Frame((0, 0), (4, 400)), False)  # none can


def framed(image: Tensor, frame: Frame, fill: int) -> Tensor:
    """Return the frame as an image of its own: the slow twin of ``through``."""
    (top, left), (height, width) = frame
    h, w = image.shape[1:]
    around = torch.full((3, 400, 400), fill, dtype=torch.uint8)
    around[:, 100 : 100 + h, 100 : 100 + w] = image
    return around[:, 100 + top : 100 + top + height, 100 + left : 100 + left + width]


FRAMES = [
    Frame((0, 0), (40, 60)),
    Frame((5, 10), (20, 30)),
    Frame((-30, -50), (120, 150)),
    Frame((-10, 20), (40, 80)),
    Frame((30, 50), (60, 60)),
]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_window_through_a_frame_shows_what_it_shows_of_the_framed_image(frame: Frame) -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    for seed in range(20):
        torch.manual_seed(seed)
        window = ResizeAndCrop(crop=(30, 36)).draw(frame.size)  # at its own scale: exact
        seen = window_image(image, through(window, frame, (40, 60)), 7)
        assert_close(seen, window_image(framed(image, frame, 7), window, 7), rtol=0, atol=0)


@pytest.mark.parametrize("frame", FRAMES)
def test_boxes_and_masks_go_through_a_resized_frame_together(frame: Frame) -> None:
    boxes = torch.tensor([[4.0, 6, 30, 20], [50, 30, 60, 40]])
    masks = torch.zeros((2, 40, 60), dtype=torch.bool)
    for row, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        masks[row, y1:y2, x1:x2] = True
    offset = torch.tensor([frame.start[1], frame.start[0]]).repeat(2)
    for seed in range(20):
        torch.manual_seed(seed)
        window = ResizeAndCrop(size=(48, 48), scale=(0.3, 2.0)).draw(frame.size)
        whole = through(window, frame, (40, 60))
        assert whole.canvas == (48, 48)
        expected = window_boxes(boxes - offset, window)
        if not whole.empty:
            assert_close(window_boxes(boxes, whole).clamp(0, 48), expected.clamp(0, 48), rtol=0, atol=1.5)
        view = Place(window=whole, fill=0).view
        assert view is not None
        low, high = window_boxes(view, whole).clamp(0, 48)[0].split(2)  # where the source ends on the canvas
        seen = torch.minimum(torch.maximum(window_boxes(boxes, whole), low.repeat(2)), high.repeat(2))
        for box, mask in zip(seen, window_mask(masks, whole), strict=True):
            if mask.any():
                rows, columns = mask.nonzero().unbind(dim=1)
                around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                assert float((around - box).abs().max()) <= 1.0
            else:
                assert float((box[2:] - box[:2]).min()) <= 1.0


def test_nothing_in_sight_is_all_fill_and_boxes_lie_outside() -> None:
    image = torch.zeros((3, 10, 10), dtype=torch.uint8)
    frame = Frame((-20, -20), (60, 60))
    for start in ((0, 0), (45, 45), (0, 45), (10, 52)):
        window = Window(start=start, span=(8, 8), shown=(16, 16), offset=(2, 2), canvas=(20, 20))
        whole = through(window, frame, (10, 10))
        assert whole.empty
        assert bool((window_image(image, whole, 9) == 9).all())
        assert not window_mask(torch.ones((1, 10, 10), dtype=torch.bool), whole).any()
        box = window_boxes(torch.tensor([[0.0, 0, 10, 10]]), whole).clamp(0, 20)
        assert float(((box[:, 2:] - box[:, :2]).prod(dim=1)).max()) == 0.0
