from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detseg.data.check import DataError
from detseg.data.maps import check_map, count_values, identity_labels, segments
from detseg.ops import rle


def test_unknown_value_names_file_value_and_what_is_allowed(tmp_path: Path) -> None:
    values = np.array([[0, 1, 7], [7, 255, 0]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "m.png")
    assert check_map(tmp_path / "m.png", (2, 3), {0, 1, 7, 255}).tolist() == values.tolist()
    assert check_map(tmp_path / "m.png", (2, 3), None).dtype == np.int32
    with pytest.raises(DataError) as caught:
        check_map(tmp_path / "m.png", (2, 3), {0, 1, 255})
    assert "m.png: value 7 (2 pixels)" in str(caught.value) and "[0, 1, 255]" in str(caught.value)
    with pytest.raises(DataError, match=r"the map is \(2, 3\), but its image is \(3, 2\)"):
        check_map(tmp_path / "m.png", (3, 2), None)


@pytest.mark.parametrize("highest", [1, 255, 65535, 70000, 2**31 - 1])
def test_values_are_counted_whatever_their_range(highest: int) -> None:
    values = np.array([[0, highest, highest], [3, 3, 3]], dtype=np.int32)
    wanted = {0: 1, 3: 3, highest: 2}
    assert count_values(values) == wanted and count_values(values[:0]) == {}
    assert count_values(np.where(values == 0, -5, values)) == {
        -5 if value == 0 else value: n for value, n in wanted.items()
    }


def test_segments_are_the_objects_of_a_map() -> None:
    values = np.zeros((6, 8), dtype=np.int32)
    values[1:3, 2:5] = 400
    values[5, 7] = 9
    values[0, 0] = 400  # an object in two parts
    found = {value: (box, code) for value, box, code in segments(values)}
    assert {value: box for value, (box, _) in found.items()} == {400: [0, 0, 5, 3], 9: [7, 5, 8, 6]}
    for value, (_, code) in found.items():
        mask = rle.decode([rle.RLE(size=[6, 8], counts=code)], (6, 8))[0]
        np.testing.assert_array_equal(mask.numpy(), values == value)
    assert [value for value, _, _ in segments(values, skip=(0, 9))] == [400]


def test_identity_labels_ignore_what_is_no_class() -> None:
    labels = identity_labels(3)
    assert labels[:4].tolist() == [0, 1, 2, 255] and labels[255] == 255 and labels.shape == (256,)
