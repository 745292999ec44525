from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detseg.data.check import DataError
from detseg.data.masks import MaskFolder
from detseg.data.transforms import SemanticTrain
from drawn_data import NAMES, scenes, write_maps
from shared import SHARED, needs_shared

ALL = ["background", *NAMES]


def semantic(data: MaskFolder, number: int) -> np.ndarray:
    found = data.dataset("train")[number].target.semantic
    assert found is not None
    return found.labels.numpy()


def rewrite(root: Path, number: int, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(root / "train" / "masks" / f"{number:03d}.png")


def test_index_maps_by_class_names(tmp_path: Path) -> None:
    data = MaskFolder(root=write_maps(tmp_path, scenes()), val=None, class_names=ALL, num_classes=4)
    for number, scene in enumerate(scenes()):
        np.testing.assert_array_equal(semantic(data, number), scene.classes)
    assert data.class_names == ALL and data.category_ids == [0, 1, 2, 3]


def test_explicit_values(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    for number, scene in enumerate(scenes()):
        rewrite(tmp_path, number, np.array([0, 255, 128, 7])[scene.classes])
    values: dict[int, str | None] = {0: "background", 255: "person", 128: "person", 7: None}
    data = MaskFolder(root=tmp_path, val=None, values=values)
    assert data.class_names == ["background", "person"] and data.num_classes == 2
    for number, scene in enumerate(scenes()):
        np.testing.assert_array_equal(semantic(data, number), np.array([0, 1, 1, 255])[scene.classes])
    swapped = MaskFolder(root=tmp_path, val=None, values=values, class_names=["person", "background"])
    np.testing.assert_array_equal(semantic(swapped, 0), np.array([1, 0, 0, 255])[scenes()[0].classes])


def test_a_value_that_is_not_listed_is_an_error(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    rewrite(tmp_path, 1, np.full((48, 64), 254))
    for options in ({"class_names": ALL}, {"values": {0: "background", 255: "person"}}):
        with pytest.raises(DataError) as caught:
            MaskFolder(root=tmp_path, val=None, **options).dataset("train")  # type: ignore[arg-type]
        if "class_names" in options:
            assert "001.png: value 254 (3072 pixels)" in str(caught.value)
            assert "allowed [0, 1, 2, 3, 255]" in str(caught.value)
        else:
            assert "allowed [0, 255]" in str(caught.value)


def test_missing_partners_are_reported_and_sizes_must_agree(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    (tmp_path / "train" / "masks" / "000.png").unlink()
    (tmp_path / "train" / "images" / "001.png").unlink()
    data = MaskFolder(root=tmp_path, val=None, class_names=ALL).dataset("train")
    assert len(data) == 2 and data.report.count("missing_mask") == 1 and data.report.count("missing_image") == 1
    rewrite(tmp_path, 2, np.zeros((64, 48)))
    with pytest.raises(DataError, match=r"002\.png: the map is \(64, 48\), but its image is \(48, 64\)"):
        MaskFolder(root=tmp_path, val=None, class_names=ALL).dataset("train")
    with pytest.raises(DataError, match=r"there is no folder .*other"):
        MaskFolder(root=tmp_path, val=None, masks="other", class_names=ALL).dataset("train")


@pytest.mark.parametrize("truth", ["boxes", "instances", "semantic"])
def test_sixteen_bit_ids_give_objects(tmp_path: Path, truth: str) -> None:
    write_maps(tmp_path, scenes(), kind="instances", suffix="_inst")
    wanted = ["background", "thing"] if truth == "semantic" else ["thing"]
    data = MaskFolder(
        root=tmp_path, val=None, holds="instances", mask_suffix="_inst", class_names=wanted, truth=truth
    ).dataset("train")
    assert data.class_names == wanted
    for number, scene in enumerate(scenes()):
        target = data[number].target
        assert target.labels.tolist() == [0] * len(scene.labels)
        for place, box in enumerate(target.boxes.tolist()):
            rows, columns = np.nonzero(scene.objects == place + 1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if truth == "instances":
                assert target.masks is not None
                np.testing.assert_array_equal(target.masks[place].numpy(), scene.objects == place + 1)
        if truth == "semantic":
            assert target.semantic is not None
            np.testing.assert_array_equal(target.semantic.labels.numpy(), scene.objects > 0)


def test_images_that_share_a_name_and_values_the_wrong_way_round(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    Image.open(tmp_path / "train/images/001.png").save(tmp_path / "train/images/001.jpg")
    with pytest.raises(DataError, match=r"001\.jpg and 001\.png share a name"):
        MaskFolder(root=tmp_path, val=None, class_names=ALL).dataset("train")
    with pytest.raises(ValueError, match=r"must be \{value: class\}.*background"):
        MaskFolder(root=tmp_path, val=None, values={"background": 0})  # type: ignore[dict-item]


def test_ids_that_carry_their_class(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    for number, scene in enumerate(scenes()):
        values = np.where(scene.objects > 0, scene.classes.astype(np.int64) * 1000 + scene.objects, 7)
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "train" / "masks" / f"{number:03d}.png")
    options: dict[str, Any] = {"holds": "instances", "instance_divisor": 1000, "truth": "instances", "val": None}
    data = MaskFolder(root=tmp_path, values=dict(enumerate(NAMES, start=1)), **options)
    assert data.class_names == list(NAMES)
    for number, scene in enumerate(scenes()):
        assert sorted(data.dataset("train")[number].target.labels.tolist()) == sorted(scene.labels)
    with pytest.raises(DataError, match=r"is of class 3; allowed are \[1, 2\]"):
        MaskFolder(root=tmp_path, values={1: "cup", 2: "plate"}, **options).dataset("train")
    without = MaskFolder(root=tmp_path, values={1: "cup", 2: None, 3: "fork"}, **options)
    assert without.class_names == ["cup", "fork"]
    kept = [label for scene in scenes() for label in scene.labels if label != 1]
    assert without.dataset("train").report.objects == len(kept)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="do not tell them apart"):
        MaskFolder(root=".", class_names=ALL, truth="boxes")
    with pytest.raises(ValueError, match="not guessed"):
        MaskFolder(root=".")
    with pytest.raises(ValueError, match="choose classes or instances"):
        MaskFolder(root=".", class_names=ALL, holds="panoptic")


@needs_shared
def test_real_nuclei_from_their_instance_maps() -> None:
    options: dict[str, Any] = {"images": "{split}", "masks": "{split}", "mask_suffix": "_inst", "holds": "instances"}
    root = SHARED / "data" / "dsb2018"
    data = MaskFolder(root=root, truth="instances", class_names=["nucleus"], train=None, **options)
    assert len(data.dataset("val")) == 30 and data.report["val"].objects == 868
    sample = data.dataset("val")[1]
    ids = np.array(Image.open(root / sample.target.file.replace(".jpg", "_inst.png")))
    assert sample.target.masks is not None
    assert sample.target.masks.flatten(1).sum(dim=1).tolist() == np.bincount(ids.reshape(-1))[1:].tolist()


def test_values_as_a_list(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    for number, scene in enumerate(scenes()):
        rewrite(tmp_path, number, np.array([0, 2, 1, 255])[scene.classes])
    data = MaskFolder(root=tmp_path, val=None, values=[None, "cup", "plate"])
    assert data.class_names == ["cup", "plate"]
    for number, scene in enumerate(scenes()):
        np.testing.assert_array_equal(semantic(data, number), np.array([255, 1, 0, 255])[scene.classes])
    rewrite(tmp_path, 0, np.full((48, 64), 3))
    with pytest.raises(DataError, match=r"000\.png: value 3 \(3072 pixels\) .* allowed \[0, 1, 2, 255\]"):
        MaskFolder(root=tmp_path, val=None, values=[None, "cup", "plate"]).dataset("train")


def test_a_list_of_names_chooses_the_images_of_a_split(tmp_path: Path) -> None:
    write_maps(tmp_path, scenes())
    for split, names in {"train": "002\n000\n", "val": "001\n009\n"}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    data = MaskFolder(root=tmp_path, images="train/images", masks="train/masks", lists="{split}.txt", class_names=ALL)
    for number, place in enumerate((2, 0)):
        np.testing.assert_array_equal(semantic(data, number), scenes()[place].classes)
    assert len(data.dataset("val")) == 1 and data.report["val"].findings["missing_image"].first == [
        "009 has neither image nor map"
    ]
    (tmp_path / "train.txt").write_text("000\n")  # whoever changes the list gets another data set
    again = MaskFolder(root=tmp_path, images="train/images", masks="train/masks", lists="{split}.txt", class_names=ALL)
    assert len(again.dataset("train")) == 1


def test_a_class_that_a_split_lacks_keeps_its_label(tmp_path: Path) -> None:
    for split, kept in (("train", [0, 1, 2, 3]), ("val", [0, 2, 2, 0])):
        write_maps(tmp_path, scenes(), split)
        for number, scene in enumerate(scenes()):
            values = np.array(kept, dtype=np.uint8)[scene.classes]
            Image.fromarray(values).save(tmp_path / split / "masks" / f"{number:03d}.png")
    data = MaskFolder(root=tmp_path, class_names=ALL)
    data.setup("fit")
    assert data.class_names == ALL and data.num_classes == 4
    assert data.report["val"].findings["absent_class"].first == ["cup", "fork"]
    assert data.report["val"].clean and "absent_class" not in data.report["train"].findings
    found = data.dataset("val")[0].target.semantic
    assert found is not None and set(found.labels.unique().tolist()) == {0, 2}


def test_maps_in_which_every_pixel_is_ignored(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_maps(tmp_path, scenes(), split)
        for number in range(4):
            Image.fromarray(np.full((48, 64), 255, dtype=np.uint8)).save(
                tmp_path / split / "masks" / f"{number:03d}.png"
            )
    data = MaskFolder(root=tmp_path, val=None, test="test", class_names=ALL)
    with pytest.raises(DataError, match=r"train/masks: every pixel of 4 maps is ignored \(values \[255\]\); look at"):
        data.dataset("train")
    assert len(data.dataset("test")) == 4 and data.report["test"].count("absent_class") == 4


def test_images_one_pixel_high_and_wide(tmp_path: Path) -> None:
    for folder in ("train/images", "train/masks"):
        (tmp_path / folder).mkdir(parents=True)
    for name, size in {"wide": (1, 50), "high": (50, 1), "dot": (1, 1)}.items():
        Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(tmp_path / "train/images" / f"{name}.png")
        Image.fromarray(np.ones(size, dtype=np.uint8)).save(tmp_path / "train/masks" / f"{name}.png")
    recipe = SemanticTrain(crop=(16, 24), scale=(0.5, 2.0), cat_max_ratio=0.75)
    data = MaskFolder(
        root=tmp_path, val=None, class_names=ALL, train_transform=recipe, batch_size=3, num_workers=0, size_divisor=8
    )
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch.images.shape) == (3, 3, 16, 24)
    for target in batch.targets:
        assert target.semantic is not None and target.semantic.size == (16, 24)
        assert set(target.semantic.labels.unique().tolist()) == {1, 255}
