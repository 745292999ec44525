from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.testing import assert_close

from detseg.data.check import DataError
from detseg.data.coco import Coco
from detseg.data.image import ORIENTATION
from detseg.data.sample import SampleDataset
from drawn_data import COCO_IDS, NAMES, coco_entries, scenes, write_coco
from shared import SHARED, needs_shared

SIZE = [48, 64]


def read(root: Path, content: dict[str, Any] | None = None, **options: Any) -> SampleDataset:
    write_coco(root, scenes(), content=content)
    return Coco(root=root, val=None, num_workers=0, **options).dataset("train")


def masks_of(root: Path, images: str = "annotations/instances_train.json") -> dict[int, list[np.ndarray]]:
    """Return the masks by image id as pycocotools has them."""
    oracle = COCO(root / images)
    return {
        number: [oracle.annToMask(item).astype(bool) for item in oracle.loadAnns(oracle.getAnnIds(imgIds=number))]
        for number in oracle.getImgIds()
    }


def test_boxes_labels_and_ids(tmp_path: Path) -> None:
    data, drawn = read(tmp_path), scenes()
    assert len(data) == 4 and list(data.class_names) == list(NAMES) and list(data.category_ids) == list(COCO_IDS)
    for number, scene in enumerate(drawn):
        image, target, truth = data[number]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), scene.pixels)
        assert target.boxes.tolist() == [scene.box(place) for place in range(len(scene.labels))]
        assert target.labels.tolist() == scene.labels
        assert (target.image_id, target.size) == (10 * number, (48, 64)) and target.file.endswith(f"{number:03d}.png")
        assert target.masks is None and truth is None
    assert data.report.count("no_objects") == 1 and data.report.clean  # type: ignore[attr-defined]


def recoded(kind: str) -> dict[str, Any]:
    """Return the drawn file with its polygons as run-length codes."""
    content = coco_entries(scenes())
    for item in content["annotations"]:
        code = coco_mask.merge(coco_mask.frPyObjects(item["segmentation"], *SIZE))
        if kind == "compressed":
            item["segmentation"] = {"size": SIZE, "counts": code["counts"].decode()}
        else:
            pixels = coco_mask.decode(code).reshape(-1, order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels]))).tolist()
            item["segmentation"] = {"size": SIZE, "counts": np.diff([0, *edges, pixels.size]).tolist()}
    return content


@pytest.mark.parametrize("kind", ["polygons", "compressed", "uncompressed"])
def test_masks_equal_pycocotools_in_every_form(tmp_path: Path, kind: str) -> None:
    data = read(tmp_path, None if kind == "polygons" else recoded(kind), truth="instances")
    expected = masks_of(tmp_path)
    assert sum(map(len, expected.values())) == 7
    for number in range(len(data)):
        target = data[number].target
        stack = np.array(expected[target.image_id], dtype=bool).reshape(-1, *SIZE)
        assert target.masks is not None
        np.testing.assert_array_equal(target.masks.numpy(), stack)


def test_crowd_is_kept_and_ignored_in_the_painted_map(tmp_path: Path) -> None:
    content = recoded("uncompressed")
    content["annotations"][0]["iscrowd"] = 1
    data = read(tmp_path, content, truth="semantic")
    assert list(data.class_names) == ["background", *NAMES] and list(data.category_ids) == [0, *COCO_IDS]
    target, scene = data[0].target, scenes()[0]
    assert target.iscrowd.tolist() == [True, False] and target.semantic is not None
    expected = scene.classes.astype(np.int64)
    expected[scene.objects == 1] = 255
    np.testing.assert_array_equal(target.semantic.labels.numpy(), expected)


def test_painted_map_is_the_drawn_one(tmp_path: Path) -> None:
    data = read(tmp_path, truth="semantic", cache_images=True)
    data.prepare()
    for number, scene in enumerate(scenes()):
        semantic = data[number].target.semantic
        assert semantic is not None
        np.testing.assert_array_equal(semantic.labels.numpy(), scene.classes)


def broken() -> dict[str, Any]:
    """Return a file with one fault of many kinds; images 0 and 1 have two and three sound objects."""
    content = coco_entries(scenes())
    sound = content["annotations"][0]
    boxes = {
        "clipped": [-5, 4, 20, 10],
        "zero_area": [5, 5, 0, 4],
        "inverted": [30, 30, -6, 4],
        "not_finite": [float("nan"), 1, 4, 4],
        "outside": [70, 4, 5, 5],
    }
    for number, box in enumerate(boxes.values(), start=50):
        content["annotations"].append(sound | {"id": number, "bbox": box})
    content["annotations"] += [
        sound | {"id": 60, "category_id": 5},
        sound | {"id": 61, "image_id": 999},
        sound | {"id": 62, "bbox": [1, 1, 3, 3]},
        sound | {"id": 62, "bbox": [2, 2, 3, 3]},  # the same id, another object: kept
        dict(sound),  # an exact copy: dropped
        sound | {"id": 63, "segmentation": [[1, 2, 3, 4]]},
    ]
    content["images"].append({"id": 77, "file_name": "gone.png", "height": 48, "width": 64})
    content["images"].append(dict(content["images"][0]))
    content["images"][1]["width"] = 60
    return content


def test_every_fault_is_counted_and_named(tmp_path: Path) -> None:
    data = read(tmp_path, broken())
    report = data.report  # type: ignore[attr-defined]
    counts = {kind: finding.count for kind, finding in report.findings.items()}
    assert counts == {
        "clipped": 1, "zero_area": 1, "inverted": 1, "not_finite": 1, "outside": 1, "unknown_category": 1,
        "unknown_image": 1, "duplicate_id": 3, "bad_polygon": 1, "missing_image": 1, "image_size": 1, "no_objects": 1,
    }  # fmt: skip
    assert report.images == 4 and report.objects == 7 + 1 + 2 + 1
    assert "gone.png" in str(report) and "image 999" in str(report) and "(48, 60), file (48, 64)" in str(report)
    assert data[0].target.boxes[2].tolist() == [0, 4, 15, 14]


def test_the_check_runs_once_for_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(tmp_path, broken())
    monkeypatch.setattr(Coco, "scan", lambda self, split: pytest.fail("checked again"))
    again = Coco(root=tmp_path, val=None).dataset("train")
    assert str(again.report) == str(first.report)  # type: ignore[attr-defined]
    assert_close(again[0].target.boxes, first[0].target.boxes)
    with pytest.raises(pytest.fail.Exception):
        read(tmp_path)  # other content
    with pytest.raises(pytest.fail.Exception):
        Coco(root=tmp_path, val=None, truth="instances").dataset("train")  # other needs


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"segmentation": {"size": [48, 60], "counts": "0"}}, ["annotation 0", "(48, 60)", "(48, 64)"]),
        ({"segmentation": {"size": SIZE, "counts": [5, 5]}}, ["annotation 0", "sum to 10", "3072"]),
        ({"segmentation": {"size": SIZE, "counts": "05"}}, ["annotation 0", "broken mask"]),
        ({"bbox": [1, 2, 3]}, ["annotation 0", "[1, 2, 3]", "4 numbers"]),
        ({"bbox": [1, 2, "x", 3]}, ["annotation 0", "'x'"]),
        ({"image_id": None}, ["annotation 0", "'image_id'"]),
        ({"image_id": "im_0"}, ["annotation 0", "'im_0'", "whole numbers"]),
        ({"category_id": 7.5}, ["annotation 0", "category_id 7.5", "whole numbers"]),
        ({"area": "large"}, ["annotation 0", "area 'large'"]),
        ({"segmentation": ["a", "b"]}, ["annotation 0", "['a', 'b']", "x1, y1"]),
        ({"segmentation": [None]}, ["annotation 0", "[None]"]),
        ({"segmentation": {"size": 48, "counts": [3072]}}, ["annotation 0", "size 48"]),
        ({"bbox": None, "segmentation": None}, ["annotation 0", "neither a bbox nor a segmentation"]),
    ],
)
def test_what_cannot_be_repaired_names_file_id_and_value(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    content = coco_entries(scenes())
    content["annotations"][0] |= change
    with pytest.raises(DataError) as caught:
        read(tmp_path, content)
    for part in ["instances_train.json", *parts]:
        assert part in str(caught.value)


def test_numbers_as_text_and_a_mark_at_the_start(tmp_path: Path) -> None:
    """As some exports write them; ``bool("0")`` would make a crowd of every object."""
    content = coco_entries(scenes())
    for item in content["annotations"]:
        item |= {key: str(item[key]) for key in ("id", "image_id", "category_id", "iscrowd", "area")}
    content["annotations"][0]["iscrowd"] = "1"
    file = write_coco(tmp_path, scenes(), content=content)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = Coco(root=tmp_path, val=None).dataset("train")
    crowds = [flag for number in range(len(data)) for flag in data[number].target.iscrowd.tolist()]
    assert crowds == [True] + [False] * (len(content["annotations"]) - 1)
    assert data[0].target.labels.tolist() == scenes()[0].labels


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_lists_of_something_else(tmp_path: Path, key: str) -> None:
    for wrong in (None, {"a": 1}, ["a"]):
        with pytest.raises(DataError, match=rf"instances_train\.json: '{key}' must be a list"):
            read(tmp_path, coco_entries(scenes()) | {key: wrong})


def test_files_that_are_none(tmp_path: Path) -> None:
    file = write_coco(tmp_path, scenes())
    for text, part in [("{", "not JSON"), ("[]", "a list, as results are"), ('{"images": []}', "'categories'")]:
        file.write_text(text)
        with pytest.raises(DataError, match=part):
            Coco(root=tmp_path, val=None).dataset("train")
    file.unlink()
    with pytest.raises(DataError, match=r"instances_train\.json: no such file"):
        Coco(root=tmp_path, val=None).dataset("train")
    with pytest.raises(DataError, match="there is no folder"):
        Coco(root=tmp_path / "nowhere").dataset("train")


@pytest.mark.parametrize("key", ["categories", "images"])
def test_ids_that_stand_for_two_things_are_errors(tmp_path: Path, key: str) -> None:
    content = coco_entries(scenes())
    twin = dict(content[key][0])
    twin["name" if key == "categories" else "file_name"] = "another"
    content[key].append(twin)
    with pytest.raises(DataError, match="stands for both"):
        read(tmp_path, content)


def test_boxes_made_before_an_exif_rotation_are_an_error(tmp_path: Path) -> None:
    file = write_coco(tmp_path, scenes())
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(scenes()[0].pixels).save(tmp_path / "train" / "000.png", exif=exif)
    with pytest.raises(DataError, match=r"48 x 64 .* before its EXIF rotation; upright it is 64 x 48"):
        Coco(root=tmp_path, val=None).dataset("train")
    content = json.loads(file.read_text())
    content["images"][0] |= {"height": 64, "width": 48}  # annotated as it is seen
    file.write_text(json.dumps(content))
    assert Coco(root=tmp_path, val=None).dataset("train")[0].image.shape == (3, 64, 48)


def test_classes_are_chosen_ordered_and_checked(tmp_path: Path) -> None:
    data = read(tmp_path, class_names=["fork", "cup"])
    wanted = [[["fork", "cup"].index(NAMES[label]) for label in scene.labels if label != 1] for scene in scenes()]
    assert [data[number].target.labels.tolist() for number in range(4)] == wanted
    assert list(data.category_ids) == [44, 3]
    with pytest.raises(DataError, match=r"num_classes=4 was asked for, but the files have 3"):
        read(tmp_path, num_classes=4)
    with pytest.raises(DataError, match=r"wanted: \['cow'\]; found: \['cup', 'plate', 'fork'\]"):
        read(tmp_path, class_names=["cow"])


def test_an_image_that_changed_after_the_check_is_an_error(tmp_path: Path) -> None:
    data = read(tmp_path)
    Image.fromarray(np.zeros((10, 11, 3), dtype=np.uint8)).save(tmp_path / "train" / "000.png")
    with pytest.raises(DataError, match=r"000\.png: 10 x 11 .* but 48 x 64"):
        data[0]


@needs_shared
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_photos(split: str) -> None:
    root = SHARED / "data" / "coco_ccby"
    data = Coco(root=root, annotations="instances_{split}.json", truth="instances").dataset(split)
    assert len(data) == {"train": 33, "val": 27}[split] and len(data.class_names) == 80
    assert data.category_ids[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13] and data.category_ids[-1] == 90
    expected = masks_of(root, f"instances_{split}.json")
    crowds = 0
    for number in range(len(data)):
        target = data[number].target
        crowds += int(target.iscrowd.sum())
        assert target.masks is not None
        np.testing.assert_array_equal(
            target.masks.numpy(), np.array(expected[target.image_id]).reshape(target.masks.shape)
        )
    assert crowds == {"train": 3, "val": 2}[split]


@needs_shared
def test_real_nuclei_agree_with_their_instance_maps() -> None:
    root = SHARED / "data" / "dsb2018"
    data = Coco(root=root, annotations="{split}.json", truth="instances")
    assert [len(data.dataset(split)) for split in data.splits] == [120, 30]
    assert [data.report[split].objects for split in data.splits] == [3799, 868]
    assert data.class_names == ["nucleus"] and data.category_ids == [1]
    target = data.dataset("val")[0].target
    ids = np.array(Image.open(root / target.file.replace(".jpg", "_inst.png")))
    assert target.masks is not None and len(target) == len(np.unique(ids)) - 1
    assert_close(target.masks.any(dim=0), torch.from_numpy(ids > 0))
