from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import tensor
from torch.testing import assert_close

from detseg.data.check import DataError
from detseg.data.yolo import Yolo, label_path
from detseg.ops import rle
from drawn_data import NAMES, scenes, write_yolo


def relabel(root: Path, text: str, number: int = 0) -> Path:
    file = root / "labels" / "train" / f"{number:03d}.txt"
    file.write_text(text)
    return root


def test_boxes_and_images_without_a_label_file(tmp_path: Path) -> None:
    data = Yolo(root=write_yolo(tmp_path, scenes()), val=None).dataset("train")
    assert len(data) == 4 and data.class_names == list(NAMES) and data.category_ids == [0, 1, 2]
    for number, scene in enumerate(scenes()):
        target = data[number].target
        boxes = tensor([scene.box(place) for place in range(len(scene.labels))]).reshape(-1, 4)
        assert_close(target.boxes, boxes, atol=1e-4, rtol=0)
        assert target.labels.tolist() == scene.labels
    assert data.report.count("no_objects") == 1 and data.report.clean


def test_polygons_give_masks_and_boxes(tmp_path: Path) -> None:
    data = Yolo(root=write_yolo(tmp_path, scenes(), polygons=True), val=None, truth="instances").dataset("train")
    for number, scene in enumerate(scenes()):
        target = data[number].target
        assert target.masks is not None and len(target) == len(scene.labels)
        for ring, mask, box in zip(scene.rings, target.masks, target.boxes, strict=True):
            exact = rle.polygons_to_mask([ring.reshape(-1)], (48, 64))
            assert int((mask ^ exact).sum()) <= 1  # eight decimals
            assert_close(box, tensor([*ring.min(axis=0), *ring.max(axis=0)]).float(), atol=1e-4, rtol=0)


def test_boxes_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="7 x object without a mask"):
        Yolo(root=write_yolo(tmp_path, scenes()), val=None, truth="instances").dataset("train")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("3 .5 .5 .1 .1", ["000.txt:2", "class 3", "0..2", "['cup', 'plate', 'fork']"]),
        ("-1 .5 .5 .1 .1", ["000.txt:2", "class -1", "0..2"]),
        ("1.5 .5 .5 .1 .1", ["000.txt:2", "class 1.5"]),
        ("1 .5 .5 .1", ["000.txt:2", "3 numbers"]),
        ("1 .5 .5 .1 .1 .2", ["000.txt:2", "5 numbers"]),
        ("1 .5 .5 .1 .1 .2 .3 .4", ["000.txt:2", "7 numbers"]),
        ("cup .5 .5 .1 .1", ["000.txt:2", "'cup'"]),
    ],
)
def test_lines_beyond_repair_name_file_line_value_and_range(tmp_path: Path, line: str, parts: list[str]) -> None:
    root = relabel(write_yolo(tmp_path, scenes()), f"0 .5 .5 .1 .1\n{line}\n")
    with pytest.raises(DataError) as caught:
        Yolo(root=root, val=None).dataset("train")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("names: {a: cup}", "number: name, got {'a': 'cup'}"),
        ("names: [cup]\nnc: two", "nc is two, but there are 1 names"),
        ("names: [cup]\ntrain: 5", "train: 5 is neither a folder nor a list"),
        ("names: [cup]\ntrain: null", "Set data.train, to null where there is no such split"),
    ],
)
def test_a_data_yaml_that_is_wrong_is_named(tmp_path: Path, text: str, part: str) -> None:
    file = write_yolo(tmp_path, scenes()) / "data.yaml"
    file.write_text(f"train: images/train\n{text}\n" if "train" not in text else text)
    with pytest.raises(DataError) as caught:
        Yolo(root=tmp_path, val=None).dataset("train")
    assert str(file) in str(caught.value) and part in str(caught.value)


def test_files_from_windows(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, scenes())
    label = root / "labels" / "train" / "000.txt"
    label.write_bytes(b"\xef\xbb\xbf0 .5 .5 .25 .5\r\n\r\n1 .5 .5 .25 .5\r\n")
    (root / "data.yaml").write_text(f"train: images\\train\nnames: [{', '.join(NAMES)}]\n")
    assert Yolo(root=root, val=None).dataset("train")[0].target.labels.tolist() == [0, 1]
    label.write_bytes(b"0 .5 .5 .25 .5 \xff\n")
    with pytest.raises(DataError, match=r"000\.txt: not UTF-8"):
        Yolo(root=root, val=None).dataset("train")


def test_repairable_lines_are_reported(tmp_path: Path) -> None:
    lines = [
        "0 .5 .5 .25 .5", "0 .5 .5 .25 .5", "", "1 0 .5 .5 .5", "1 .5 .5 0 .5", "1 .5 .5 -.2 .5", "1 nan .5 .2 .5",
        "2 1.5 .5 .2 .5", "2.0 .5 .5 .5 .5",
    ]  # fmt: skip
    data = Yolo(root=relabel(write_yolo(tmp_path, scenes()), "\n".join(lines)), val=None).dataset("train")
    counts = {kind: finding.count for kind, finding in data.report.findings.items()}
    assert counts == {
        "duplicate": 1, "clipped": 1, "zero_area": 1, "inverted": 1, "not_finite": 1, "outside": 1, "no_objects": 1
    }  # fmt: skip
    target = data[0].target
    assert target.boxes.tolist() == [[24, 12, 40, 36], [0, 12, 16, 36], [16, 12, 48, 36]]
    assert target.labels.tolist() == [0, 1, 2] and "line 4 of 000.txt" in str(data.report)


def test_names_and_nc_must_agree(tmp_path: Path) -> None:
    write_yolo(tmp_path, scenes())
    file = tmp_path / "data.yaml"
    text = file.read_text()
    file.write_text(text.replace("nc: 3", "nc: 4"))
    with pytest.raises(DataError, match=r"nc is 4, but there are 3 names: \['cup', 'plate', 'fork'\]"):
        Yolo(root=tmp_path, val=None).dataset("train")
    file.write_text("train: images/train\nnames: [cup, plate, fork]\n")
    assert Yolo(root=tmp_path, val=None).class_names == list(NAMES)
    file.write_text("train: images/train\n")
    with pytest.raises(DataError, match="names must be"):
        Yolo(root=tmp_path, val=None).dataset("train")
    file.write_text("names: [a]\n")
    with pytest.raises(DataError, match=r"no key 'train'.*\['names'\]"):
        Yolo(root=tmp_path, val=None).dataset("train")
    file.unlink()
    with pytest.raises(DataError, match=r"data\.yaml: no such file"):
        Yolo(root=tmp_path, val=None).dataset("train")


@pytest.mark.parametrize("entry", ["images/train", "../images/train", "[images/train]", "list.txt"])
def test_splits_are_folders_lists_or_several(tmp_path: Path, entry: str) -> None:
    write_yolo(tmp_path, scenes())
    (tmp_path / "list.txt").write_text("".join(f"./images/train/{number:03d}.png\n" for number in (2, 0, 9)))
    (tmp_path / "data.yaml").write_text(f"train: {entry}\nnames: {{0: cup, 1: plate, 2: fork}}\n")
    data = Yolo(root=tmp_path, val=None).dataset("train")
    if entry == "list.txt":
        assert len(data) == 2 and data.report.count("missing_image") == 1
        assert data[0].target.labels.tolist() == scenes()[2].labels
    else:
        assert len(data) == 4
    np.testing.assert_array_equal(
        data[1].image.permute(1, 2, 0).numpy(), scenes()[0 if entry == "list.txt" else 1].pixels
    )


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    write_yolo(tmp_path, scenes())
    (tmp_path / "data.yaml").write_text("train: images/other\nnames: [a]\n")
    with pytest.raises(DataError, match="images/other is neither a folder nor a list"):
        Yolo(root=tmp_path, val=None).dataset("train")


def test_label_path() -> None:
    assert label_path(Path("a/images/b/images/c.d.jpg")) == Path("a/images/b/labels/c.d.txt")
    assert label_path(Path("train/images/x.png")) == Path("train/labels/x.txt")
    assert label_path(Path("flat/images.png")) == Path("flat/images.txt")
