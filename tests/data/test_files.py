from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from torch.testing import assert_close

from detseg.data import files
from detseg.data.check import DataError
from detseg.data.coco import Coco
from detseg.data.files import StoreDataset, below
from drawn_data import scenes, write_coco


@pytest.mark.parametrize("truth", ["boxes", "semantic"])
def test_cached_images_are_those_of_the_files(tmp_path: Path, truth: str) -> None:
    write_coco(tmp_path, scenes())
    plain = Coco(root=tmp_path, val=None, truth=truth, cache_images=False).dataset("train")
    kept = Coco(root=tmp_path, val=None, truth=truth, cache_images=True).dataset("train")
    kept.prepare()
    for file in (tmp_path / "train").iterdir():
        expected = plain[int(file.stem)]
        file.unlink()  # so that only memory can answer
        found = kept[int(file.stem)]
        assert_close(found.image, expected.image)
        if truth == "semantic":
            assert found.target.semantic is not None and expected.target.semantic is not None
            assert_close(found.target.semantic.labels, expected.target.semantic.labels)
    plain.prepare()  # does nothing where nothing is kept
    with pytest.raises(DataError, match="no such image"):
        plain[0]


def test_of_a_split_that_is_small_enough_images_are_kept_unless_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coco(tmp_path, scenes())
    taken = sum(scene.pixels.size for scene in scenes())
    small = Coco(root=tmp_path, val=None).read("train")
    assert small.pixel_bytes == taken and small.cache_images is True
    assert Coco(root=tmp_path, val=None, truth="semantic").read("train").pixel_bytes == taken // 3 * 4
    assert Coco(root=tmp_path, val=None, cache_images=False).read("train").cache_images is False
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert Coco(root=tmp_path, val=None, num_workers=2).read("train").cache_images is False, "a copy for each worker"
    assert Coco(root=tmp_path, val=None, num_workers=0).read("train").cache_images is True
    monkeypatch.undo()
    monkeypatch.setattr(files, "KEPT_BYTES", taken - 1)
    assert Coco(root=tmp_path, val=None).read("train").cache_images is False
    assert Coco(root=tmp_path, val=None, cache_images=True).read("train").cache_images is True
    with pytest.raises(ValueError, match="true, false or auto, got 'some'"):
        Coco(root=tmp_path, val=None, cache_images="some")


def test_a_broken_image_to_keep_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path, scenes())
    samples = Coco(root=tmp_path, val=None).read("train")
    file = sorted((tmp_path / "train").iterdir())[2]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{file.name}: the image cannot be decoded"):
        samples.prepare()


def test_images_without_objects_are_dropped_in_training_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, scenes(), split)
    data = Coco(root=tmp_path, drop_empty=True)
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (3, 4)
    assert len(Coco(root=tmp_path).dataset("train")) == 4
    train = data.dataset("train")
    assert all(len(train[number].target) > 0 for number in range(3))


def test_paths_may_differ_by_split(tmp_path: Path) -> None:
    write_coco(tmp_path, scenes(), "a")
    write_coco(tmp_path, scenes(seed=3), "b")
    annotations = {"train": "annotations/instances_a.json", "val": "annotations/instances_b.json"}
    data = Coco(root=tmp_path, annotations=annotations, images={"train": "a", "val": "b"})
    np.testing.assert_array_equal(data.dataset("val")[0].image.permute(1, 2, 0).numpy(), scenes(seed=3)[0].pixels)
    with pytest.raises(DataError, match="no path for split 'val'"):
        Coco(root=tmp_path, annotations={"train": "annotations/instances_a.json"}, images="a").dataset("val")
    elsewhere = Coco(
        root=tmp_path / "annotations",
        annotations=str(tmp_path / annotations["train"]),
        images=str(tmp_path / "a"),
        val=None,
    )
    assert elsewhere.dataset("train")[0].image.shape == (3, 48, 64)  # absolute paths are taken as they are


def test_splits_are_those_that_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path, scenes())
    data = Coco(root=tmp_path, val=None)
    assert data.splits == ("train",)
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        data.dataset("val")
    with pytest.raises(ValueError, match="name at least one split"):
        Coco(root=tmp_path, train=None, val=None)


def test_a_test_split_may_be_without_objects(tmp_path: Path) -> None:
    write_coco(tmp_path, scenes(), "train")
    write_coco(tmp_path, scenes()[-1:], "test")
    write_coco(tmp_path, scenes()[-1:], "val")
    data = Coco(root=tmp_path, test="test")
    assert len(data.dataset("test")) == 1
    with pytest.raises(DataError, match="nothing to learn from: 1 images, 0 objects"):
        data.dataset("val")


def test_too_many_classes_for_a_map(tmp_path: Path) -> None:
    write_coco(tmp_path, scenes())
    samples = Coco(root=tmp_path, val=None).dataset("train")
    assert isinstance(samples, StoreDataset)
    names = type(samples.store.files).of([str(number) for number in range(255)])
    arrays = samples.store.arrays() | {"class_names.letters": names.letters, "class_names.ends": names.ends}
    arrays["category_ids"] = np.arange(255)
    store = type(samples.store).from_arrays(arrays)
    with pytest.raises(DataError, match="256 classes with the background"):
        StoreDataset(store=store, report=samples.report, root=tmp_path, truth="semantic")
    assert StoreDataset(store=store, report=samples.report, root=tmp_path).class_names[254] == "254"


def test_below(tmp_path: Path) -> None:
    assert below(tmp_path, tmp_path / "a" / "b.png") == "a/b.png"
    assert below(tmp_path / "x", tmp_path / "y.png") == str(tmp_path / "y.png")
