from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from assignment_oracle import KINDS, flatten, per_image, random_boxes
from detseg.models.ssd import ssd300_boxes
from detseg.models.ssdlite import ssdlite320_boxes
from detseg.targets.default_boxes import DefaultBoxes, MultiBoxMatcher
from detseg.targets.lattice import Lattice, build_lattice

SSD300_CELLS = [38, 19, 10, 5, 3, 1]
SSDLITE_CELLS = [20, 10, 5, 3, 2, 1]


def lattice_of(boxes: DefaultBoxes, image: tuple[int, int], cells: list[tuple[int, int]]) -> Lattice:
    return build_lattice(boxes, tuple(cells), tuple(boxes.strides(image, cells, [8] * len(cells))), "cpu")


def squares(counts: list[int]) -> list[tuple[int, int]]:
    return [(count, count) for count in counts]


def torchvision_boxes(theirs: DefaultBoxGenerator, size: int, cells: list[int]) -> Tensor:
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    (found,) = theirs(images, [torch.zeros(1, 1, count, count) for count in cells])
    return found


def test_those_of_ssd300_are_torchvisions_bit_by_bit() -> None:
    theirs = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    lattice = lattice_of(ssd300_boxes(), (300, 300), squares(SSD300_CELLS))
    assert lattice.total == 8732  # section 3.1
    assert_close(lattice.boxes, torchvision_boxes(theirs, 300, SSD300_CELLS), rtol=0, atol=0)


def test_those_of_ssdlite_are_torchvisions_bit_by_bit() -> None:
    theirs = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    lattice = lattice_of(ssdlite320_boxes(), (320, 320), squares(SSDLITE_CELLS))
    assert lattice.total == 3234
    assert_close(lattice.boxes, torchvision_boxes(theirs, 320, SSDLITE_CELLS), rtol=0, atol=0)


def test_shapes_by_hand() -> None:
    boxes = DefaultBoxes(image_size=100, scales=[0.16, 0.36], ratios=[[4]], steps=[10])
    (level,) = boxes([(1, 2)], [(10, 10)])
    # Sides 16 and sqrt(16 * 36) = 24, then 32 x 8 and 8 x 32, about (5, 5) and (15, 5).
    first = torch.tensor([[-3.0, -3, 13, 13], [-7, -7, 17, 17], [-11, 1, 21, 9], [1, -11, 9, 21]])
    assert_close(level, torch.cat([first, first + torch.tensor([10.0, 0, 10, 0])]), rtol=0, atol=1e-5)
    assert boxes.num_anchors() == [4]


@pytest.mark.parametrize(("clip", "side"), [(True, 100.0), (False, 180.0)])
def test_sides_are_clipped_to_the_image(clip: bool, side: float) -> None:
    boxes = DefaultBoxes(image_size=100, scales=[0.9, 1.0], ratios=[[4]], clip=clip)
    (level,) = boxes([(1, 1)], [(100, 100)])
    assert_close((level[:, 2] - level[:, 0]).amax(), torch.tensor(side), rtol=0, atol=1e-4)


def test_boxes_keep_their_pixels_in_images_of_any_size_and_levels_without_a_step_spread() -> None:
    boxes = DefaultBoxes(image_size=64, scales=[0.25, 0.5, 1.0], ratios=[[2], [2]], steps=[8, None])
    cells = [(6, 11), (2, 3)]
    lattice = lattice_of(boxes, (48, 88), cells)
    assert boxes.strides((48, 88), cells, [8, 16]) == [(8, 8), (24.0, 88 / 3)]
    squares_of_level_two = lattice.boxes[lattice.counts[0] :: 4]
    assert_close(squares_of_level_two[:, 2] - squares_of_level_two[:, 0], torch.full((6,), 32.0))
    centres = (squares_of_level_two[:, :2] + squares_of_level_two[:, 2:]) / 2
    assert_close(centres[:3], torch.tensor([[88 / 6, 12.0], [44.0, 12.0], [440 / 6, 12.0]]))
    shifted = lattice.shapes.base[lattice.shapes.level == 1] + torch.tensor([2 * 88 / 3, 24.0] * 2)
    assert_close(lattice.boxes[-4:], shifted)  # what the windows of the matcher rely on


def test_numbers_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="2 scales, ratios for 2 levels and 2 steps"):
        DefaultBoxes(image_size=64, scales=[0.1, 0.2], ratios=[[2], [2]])
    with pytest.raises(ValueError, match="0 levels"):
        DefaultBoxes(image_size=64, scales=[0.1], ratios=[])
    with pytest.raises(ValueError, match="must be positive"):
        DefaultBoxes(image_size=64, scales=[0.1, 0.2], ratios=[[2]], steps=[0])
    with pytest.raises(ValueError, match="1 levels, but the features have 2"):
        DefaultBoxes(image_size=64, scales=[0.1, 0.2], ratios=[[2]])([(1, 1)] * 2, [(64, 64)] * 2)
    with pytest.raises(ValueError, match=r"threshold is 0\.0"):
        MultiBoxMatcher(threshold=0.0)


def torchvision_matches(boxes: list[Tensor], lattice: Lattice) -> Tensor:
    none = torch.full((lattice.total,), -1)
    matcher = SSDMatcher(0.5)
    return torch.stack([matcher(box_iou(box, lattice.boxes)) if len(box) else none for box in boxes])


@pytest.mark.parametrize("kind", KINDS)
def test_every_default_box_gets_the_object_that_torchvision_gives_it(kind: str) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    positives = 0
    for boxes, size, cells in [(ssd300_boxes(), 300, SSD300_CELLS), (ssdlite320_boxes(), 320, SSDLITE_CELLS)]:
        lattice = lattice_of(boxes, (size, size), squares(cells))
        for _ in range(10):
            counts = torch.randint(0, 25, (3,), generator=generator).tolist()  # some images stay empty
            objects = [random_boxes(kind, count, size, size, generator) for count in counts]
            matched = per_image(MultiBoxMatcher()(*flatten(objects), 3, lattice), objects)
            assert_close(matched, torchvision_matches(objects, lattice), rtol=0, atol=0)
            positives += int((matched >= 0).sum())
    assert positives > 300


def test_two_thousand_objects_in_an_image_are_matched_as_torchvision_does() -> None:
    generator = torch.Generator().manual_seed(0)
    lattice = lattice_of(ssd300_boxes(), (300, 300), squares(SSD300_CELLS))
    objects = [random_boxes("tiny", 2100, 300, 300, generator)[:2000]]
    matched = MultiBoxMatcher()(*flatten(objects), 1, lattice)
    assert_close(matched, torchvision_matches(objects, lattice), rtol=0, atol=0)


def test_an_object_that_no_default_box_touches_makes_none_positive() -> None:
    lattice = lattice_of(ssdlite320_boxes(), (320, 320), squares(SSDLITE_CELLS))
    boxes = torch.tensor([[5000.0, 5000, 5010, 5010], [10, 10, 90, 90]])
    matched = MultiBoxMatcher()(boxes, torch.tensor([0, 1]), 2, lattice)
    assert bool((matched[0] == -1).all()) and int((matched[1] == 1).sum()) > 0


def test_of_two_objects_with_one_best_default_box_the_last_takes_it() -> None:
    boxes = DefaultBoxes(image_size=32, scales=[0.5, 0.9], ratios=[[2]], steps=[32])
    lattice = lattice_of(boxes, (32, 32), [(1, 1)])
    objects = torch.tensor([[8.0, 8, 24, 23], [8, 8, 24, 22]])
    matched = MultiBoxMatcher()(objects, torch.tensor([0, 0]), 1, lattice)
    assert matched[0, 0] == 1  # though it overlaps the first more


def test_an_empty_batch_is_all_background() -> None:
    lattice = lattice_of(ssdlite320_boxes(), (320, 320), squares(SSDLITE_CELLS))
    matched = MultiBoxMatcher()(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, lattice)
    assert matched.shape == (2, lattice.total) and bool((matched == -1).all())
