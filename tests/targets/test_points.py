from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from assignment_oracle import KINDS, POINTS, dense_points, flatten, lattice_of, per_image, random_boxes
from detseg.targets.anchors import AnchorGenerator
from detseg.targets.lattice import build_lattice
from detseg.targets.points import DistanceCoder, PointAssigner, centreness


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(128, 128), (160, 96), (64, 320)])
def test_every_point_gets_the_box_that_torchvision_gives_it(kind: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(size) + KINDS.index(kind))
    lattice = lattice_of(POINTS, *size)
    positives = 0
    for _ in range(20):
        counts = torch.randint(0, 25, (3,), generator=generator).tolist()  # some images stay empty
        boxes = [random_boxes(kind, count, *size, generator) for count in counts]
        matched = per_image(PointAssigner()(*flatten(boxes), 3, lattice), boxes)
        assert_close(matched, dense_points(boxes, lattice), rtol=0, atol=0)
        positives += int((matched >= 0).sum())
    assert positives > 20


def test_equal_areas_go_to_the_first_box_and_smaller_ones_win() -> None:
    lattice = lattice_of(POINTS, 64, 64)
    boxes = torch.tensor([[4.0, 4, 36, 36], [12, 4, 44, 36], [14, 14, 22, 22]])
    matched = PointAssigner()(boxes, torch.zeros(3, dtype=torch.int64), 1, lattice)[0]
    grid = matched[: 8 * 8].view(8, 8)
    assert grid[2, 2] == 2  # (16, 16) is central in the first and the third: the smallest wins
    assert grid[3, 3] == 0  # (24, 24) is central in the first two, which tie
    assert grid[3, 4] == 1 and grid[0, 0] == -1


def test_an_empty_batch_has_no_positive_point() -> None:
    lattice = lattice_of(POINTS, 64, 64)
    matched = PointAssigner()(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, lattice)
    assert matched.shape == (2, lattice.total) and bool((matched == -1).all())


def test_without_centre_sampling_every_inner_point_of_the_range_is_positive() -> None:
    lattice = lattice_of(POINTS, 128, 128)
    box = torch.tensor([[10.0, 20, 60, 90]])
    matched = PointAssigner(radius=None)(box, torch.zeros(1, dtype=torch.int64), 1, lattice)[0]
    points = (lattice.boxes[:, :2] + lattice.boxes[:, 2:]) / 2
    sides = torch.cat([points - box[:, :2], box[:, 2:] - points], dim=1)
    level = torch.repeat_interleave(torch.tensor(lattice.counts))
    low, high = torch.tensor([0.0, 64, 128, 256, 512])[level], torch.tensor([64.0, 128, 256, 512, torch.inf])[level]
    wanted = (sides.amin(1) > 0) & (sides.amax(1) > low) & (sides.amax(1) < high)
    assert int(wanted.sum()) > 30
    assert_close(matched >= 0, wanted)


def test_a_box_beyond_every_integer_claims_the_points_inside() -> None:
    lattice = lattice_of(POINTS, 256, 256)
    boxes = torch.tensor([[40.0, 40, 1e30, 1e30], [-1e30, -1e30, -1e25, -1e25]])
    matched = PointAssigner(radius=None)(boxes, torch.zeros(2, dtype=torch.int64), 1, lattice)[0]
    points = (lattice.boxes[:, 0] + lattice.boxes[:, 2]) / 2, (lattice.boxes[:, 1] + lattice.boxes[:, 3]) / 2
    top = torch.arange(lattice.total) >= lattice.total - lattice.counts[-1]  # the last level takes the largest boxes
    wanted = top & (points[0] > 40) & (points[1] > 40)
    assert_close(matched == 0, wanted)
    assert int(wanted.sum()) > 0 and not bool((matched == 1).any())


def test_reach_moves_boxes_between_levels() -> None:
    squares = AnchorGenerator(sizes=[[8], [16]], ratios=[[1.0]])
    lattice = build_lattice(squares, ((8, 8), (4, 4)), ((8, 8), (16, 16)), "cpu")
    box = torch.tensor([[10.0, 10, 50, 50]]), torch.zeros(1, dtype=torch.int64)
    fine = PointAssigner(reach=(4.0, 8.0))(*box, 1, lattice)[0] >= 0
    coarse = PointAssigner(reach=(1.0, 2.0))(*box, 1, lattice)[0] >= 0
    assert (int(fine[:64].sum()), int(fine[64:].sum())) == (9, 0)
    assert int(coarse[:64].sum()) == 0 and int(coarse[64:].sum()) > 0


@pytest.mark.parametrize("normalize", [True, False])
def test_coding_is_inverted_by_decoding_and_equals_torchvisions(normalize: bool) -> None:
    from torchvision.models.detection._utils import BoxLinearCoder

    references = torch.tensor([[0.0, 0, 8, 8], [16, 8, 32, 24]])
    boxes = torch.tensor([[-3.0, 1, 20, 9], [17, 9, 40, 60]])
    coder, oracle = DistanceCoder(normalize=normalize), BoxLinearCoder(normalize_by_size=normalize)
    codes = coder.encode(boxes, references)
    assert_close(codes, oracle.encode(references, boxes))
    assert_close(coder.decode(codes, references), boxes)
    assert codes[0].tolist() == ([0.875, 0.375, 2.0, 0.625] if normalize else [7.0, 3.0, 16.0, 5.0])


def test_centreness_by_hand() -> None:
    distances = torch.tensor([[2.0, 2, 2, 2], [1, 2, 4, 2], [1, 1, 4, 9]])
    assert_close(centreness(distances), torch.tensor([1.0, 0.5, 1 / 6]))
    outside = torch.tensor([[-1.0, 2, 4, 2], [1, 3, 1, -2], [-3, -3, -1, -1], [0, 0, 0, 0]])
    assert centreness(outside).tolist() == [0, 0, 0, 0]
