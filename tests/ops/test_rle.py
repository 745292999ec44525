from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.testing import assert_close

from detseg.ops import rle

SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]  # 4 wide, 3 high


def random_masks(seed: int, count: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand((count, *size), generator=torch.Generator().manual_seed(seed)) > 0.6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 4), height=st.integers(1, 30), width=st.integers(1, 30))
def test_decode_inverts_encode(seed: int, count: int, height: int, width: int) -> None:
    masks = random_masks(seed, count, (height, width))
    codes = rle.encode(masks)
    assert_close(rle.decode(codes, (height, width)), masks)
    assert rle.areas(codes).tolist() == masks.flatten(1).sum(dim=1).tolist()
    for code in codes:
        counts = rle.counts_of(code["counts"])
        rle.check_counts(counts, (height, width))
        assert rle.compress(counts, (height, width))["counts"] == code["counts"]


def test_counts_of_agrees_with_pycocotools_on_long_runs() -> None:
    mask = torch.zeros((1, 300, 400), dtype=torch.bool)
    mask[0, 20:280, 13:390] = True
    counts = rle.counts_of(rle.encode(mask)[0]["counts"])
    assert counts[0] == 13 * 300 + 20 and counts[1] == 260 and counts[2] == 40  # down the columns, zeros first
    assert sum(counts) == 300 * 400


def test_polygon_of_a_rectangle_fills_its_pixels() -> None:
    expected = torch.zeros((8, 9), dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert_close(rle.polygons_to_mask([SQUARE], (8, 9)), expected)
    assert rle.boxes([rle.polygons_to_rle([SQUARE], (8, 9))]).tolist() == [[2.0, 1.0, 6.0, 4.0]]


def test_polygons_are_united_as_pycocotools_does() -> None:
    rings = [SQUARE, [4.2, 2.1, 8.7, 2.3, 6.1, 7.9]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, 10, 12)))
    mask = rle.polygons_to_mask(rings, (10, 12))
    np.testing.assert_array_equal(mask.numpy(), expected.astype(bool))
    assert int(mask.sum()) < 12 + int(rle.polygons_to_mask(rings[1:], (10, 12)).sum())  # they overlap


def test_nothing_gives_empty_masks() -> None:
    assert rle.decode([], (3, 4)).shape == (0, 3, 4)
    assert rle.encode(torch.zeros((0, 3, 4), dtype=torch.bool)) == []
    assert not rle.polygons_to_mask([], (3, 4)).any()
    assert rle.areas([]).shape == (0,) and rle.boxes([]).shape == (0, 4)


@pytest.mark.parametrize(
    ("counts", "part"),
    [([3, 4], "sum to 7"), ([20, -5, 5], "shortest is -5"), ([], "sum to 0")],
)
def test_runs_that_do_not_fill_the_image_are_refused(counts: list[int], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        rle.compress(counts, (4, 5))
    assert "sum to 20" in str(caught.value)


def test_broken_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="' ' is not part"):
        rle.counts_of(b"02 1")
    with pytest.raises(ValueError, match="ends within a number"):
        rle.counts_of(b"02P")  # P says that more follows
    with pytest.raises(ValueError, match="3 or more"):
        rle.polygons_to_rle([[0.0, 0.0, 1.0, 1.0]], (4, 4))
    with pytest.raises(ValueError, match="at least one ring"):
        rle.polygons_to_rle([], (4, 4))
    with pytest.raises(ValueError, match=r"\(4, 5\), wanted \(5, 4\)"):
        rle.decode(rle.encode(torch.ones((1, 4, 5), dtype=torch.bool)), (5, 4))
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        rle.encode(torch.ones((4, 5), dtype=torch.bool))
