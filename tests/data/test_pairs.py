from __future__ import annotations

from pathlib import Path

import pytest

from detseg.data.check import DataError
from detseg.data.pairs import find_pairs, read_names


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def relative(files: dict[str, Path], root: Path) -> dict[str, str]:
    return {name: str(path.relative_to(root)) for name, path in files.items()}


def test_names_without_endings_and_suffixes(tmp_path: Path):
    touch(
        tmp_path,
        "i/a_left.png",
        "i/b.x_left.JPG",
        "i/c.png",
        "i/notes.txt",
        "m/a_ids.png",
        "m/b.x_ids.png",
        "m/a_col.png",
    )
    found = find_pairs(tmp_path / "i", tmp_path / "m", image_suffix="_left", mask_suffix="_ids")
    assert found.names == ["a", "b.x"]
    assert relative(found.images, tmp_path) == {"a": "i/a_left.png", "b.x": "i/b.x_left.JPG"}
    assert relative(found.maps, tmp_path) == {"a": "m/a_ids.png", "b.x": "m/b.x_ids.png"}


def test_folders_within_only_where_asked_for(tmp_path: Path):
    touch(tmp_path, "i/1/a.png", "i/2/a.png", "i/b.png", "m/1/a.png", "m/b.png")
    flat = find_pairs(tmp_path / "i", tmp_path / "m")
    assert flat.names == ["b"]
    deep = find_pairs(tmp_path / "i", tmp_path / "m", nested=True)
    assert deep.names == ["1/a", "2/a", "b"] and list(deep.maps) == ["1/a", "b"]


def test_maps_among_the_images_are_no_images(tmp_path: Path):
    touch(tmp_path, "a.jpg", "a_m.png", "b.jpg", "masks/c_m.png")
    same = find_pairs(tmp_path, tmp_path, mask_suffix="_m")
    assert relative(same.images, tmp_path) == {"a": "a.jpg", "b": "b.jpg"} and list(same.maps) == ["a"]
    within = find_pairs(tmp_path, tmp_path / "masks", mask_suffix="_m", nested=True)
    assert "masks/c" not in within.images and list(within.maps) == ["c"]


def test_hidden_files_are_left_aside(tmp_path: Path):
    touch(tmp_path, "i/a.png", "i/._a.png", "m/a.png", "m/._a.png")
    assert find_pairs(tmp_path / "i", tmp_path / "m").names == ["a"]


def test_a_list_decides_and_keeps_its_order(tmp_path: Path):
    touch(tmp_path, "i/a.png", "i/b.png", "i/c.png", "i/c.jpg", "m/a.png", "m/b.png", "m/c.png")
    (tmp_path / "x.txt").write_text("b\na\ngone\nb\n")
    found = find_pairs(tmp_path / "i", tmp_path / "m", listed=tmp_path / "x.txt")
    assert found.names == ["b", "a", "gone"] and list(found.images) == list(found.maps) == ["b", "a"]
    with pytest.raises(DataError, match=r"c\.jpg and c\.png share a name"):
        find_pairs(tmp_path / "i", tmp_path / "m")


def test_two_maps_of_a_name_are_both_named(tmp_path: Path):
    touch(tmp_path, "i/a.png", "i/b.png", "m/a.png", "m/b.bmp", "m/b.png")
    with pytest.raises(DataError, match=r"m.b\.bmp and b\.png share a name, so an image cannot tell them apart"):
        find_pairs(tmp_path / "i", tmp_path / "m")
    (tmp_path / "x.txt").write_text("a\n")
    found = find_pairs(tmp_path / "i", tmp_path / "m", listed=tmp_path / "x.txt")  # b is not asked for
    assert relative(found.maps, tmp_path) == {"a": "m/a.png"}


def test_lines_are_read_as_the_files_say(tmp_path: Path):
    file = tmp_path / "x.txt"
    file.write_text("\ufeff# name class\n\n  cat_1 1 2 3\nmy dog\nbird.jpg\nfish.v2\nlost 7\n", encoding="utf-8")
    assert read_names(file, {"cat_1", "my dog", "my", "bird", "fish.v2"}) == [
        "cat_1",
        "my dog",
        "bird",
        "fish.v2",
        "lost",
    ]


def test_what_is_missing(tmp_path: Path):
    touch(tmp_path, "i/a.png")
    with pytest.raises(DataError, match=r"there is no folder .*m; set data\.images and data\.masks"):
        find_pairs(tmp_path / "i", tmp_path / "m")
    with pytest.raises(DataError, match=r"there is no list .*x\.txt; set data\.lists"):
        find_pairs(tmp_path / "i", tmp_path / "i", listed=tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"x\.txt: names no image"):
        read_names(tmp_path / "x.txt", set())
