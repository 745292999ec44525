from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detseg.data.check import DataError
from detseg.data.voc import VOC_CLASSES, Voc
from drawn_data import NAMES, scenes, write_voc
from shared import SHARED, needs_shared

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def write_xml(root: Path, objects: str, stem: str = "train_0") -> None:
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")


def test_boxes_are_the_outer_edges_of_their_pixels(tmp_path: Path) -> None:
    data = Voc(root=write_voc(tmp_path, scenes(), difficult=1), val=None, class_names=NAMES).dataset("train")
    assert len(data) == 4 and data.class_names == list(NAMES)
    for number, scene in enumerate(scenes()):
        target = data[number].target
        assert target.boxes.tolist() == [scene.box(place) for place in range(len(scene.labels))]
        assert target.labels.tolist() == scene.labels
        assert target.difficult.tolist() == [place == 0 for place in range(len(scene.labels))]
        assert target.file == f"JPEGImages/train_{number}.png"


def test_names_come_from_the_files_of_all_splits(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes(seed=1), "train")
    write_voc(tmp_path, scenes(seed=2), "val")
    data = Voc(root=tmp_path)
    assert data.class_names == sorted(NAMES) and data.dataset("val").class_names == sorted(NAMES)
    write_xml(tmp_path, f"<object><name>dog</name>{BOX.format(2, 2, 9, 9)}</object>")
    for file in sorted((tmp_path / "Annotations").glob("*.xml"))[1:]:
        file.write_text("<annotation/>")
    (tmp_path / "ImageSets/Main/val.txt").write_text("train_0\n")
    assert Voc(root=tmp_path).class_names == list(VOC_CLASSES)
    assert Voc(root=tmp_path).dataset("train")[0].target.labels.tolist() == [VOC_CLASSES.index("dog")]


def test_boxes_without_area_and_others_are_reported(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes())
    boxes = [(5, 5, 5, 5), (9, 3, 4, 8), (1, 1, 64, 48), (0, 1, 65, 48), (3, 4, 9, 4)]
    objects = "".join(f"<object><name>cup</name>{BOX.format(*box)}</object>" for box in boxes)
    write_xml(tmp_path, objects + f"<object><name>cow</name>{BOX.format(1, 1, 5, 5)}</object>")
    data = Voc(root=tmp_path, val=None, class_names=NAMES).dataset("train")
    counts = {kind: finding.count for kind, finding in data.report.findings.items()}
    assert counts == {"zero_area": 2, "inverted": 1, "clipped": 1, "other_class": 1, "no_objects": 1}
    assert data[0].target.boxes.tolist() == [[0, 0, 64, 48]] * 2  # 1..64 are all of 64 pixels
    assert "object 6 of JPEGImages/train_0.png: 'cow'" in str(data.report)


@pytest.mark.parametrize(
    ("xml", "part"),
    [
        ("<annotation><object>", "not XML"),
        ("<annotation><object><name>cup</name></object></annotation>", r"object 1 \(cup\) needs a bndbox"),
        (f"<annotation><object>{BOX.format(1, 2, 3, 4)}</object></annotation>", "object 1 has no name"),
        (f"<annotation><object><name>cup</name>{BOX.format(1, 'x', 3, 4)}</object></annotation>", "'x'"),
    ],
)
def test_broken_xml_is_an_error_that_names_the_file(tmp_path: Path, xml: str, part: str) -> None:
    write_voc(tmp_path, scenes())
    (tmp_path / "Annotations" / "train_1.xml").write_text(xml)
    with pytest.raises(DataError, match=part) as caught:
        Voc(root=tmp_path, val=None, class_names=NAMES).dataset("train")
    assert "train_1.xml" in str(caught.value)


def test_lists_and_missing_files(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes())
    with pytest.raises(DataError, match=r"Segmentation/train\.txt: no such list"):
        Voc(root=tmp_path, val=None, image_set="Segmentation", class_names=NAMES).dataset("train")
    (tmp_path / "JPEGImages" / "train_0.png").unlink()
    data = Voc(root=tmp_path, val=None, class_names=NAMES).dataset("train")
    assert len(data) == 3 and data.report.count("missing_image") == 1
    (tmp_path / "Annotations" / "train_1.xml").unlink()
    with pytest.raises(DataError, match=r"train_1\.xml: no such file"):
        Voc(root=tmp_path, val=None, class_names=NAMES).dataset("train")


@pytest.mark.parametrize(("stem", "ending"), [("my té 1", ".png"), ("a.b", ".PNG"), ("c", ".bmp"), ("d", ".TIF")])
def test_names_with_spaces_and_every_ending_that_can_be_read(tmp_path: Path, stem: str, ending: str) -> None:
    write_voc(tmp_path, scenes())
    image = tmp_path / "JPEGImages" / "train_0.png"
    Image.open(image).save(image.with_name(f"{stem}{ending}"))
    image.unlink()
    (tmp_path / "Annotations" / "train_0.xml").rename(tmp_path / "Annotations" / f"{stem}.xml")
    flagged = f"{stem}\r\ntrain_1  -1\r\ntrain_2\t1\r\n{stem} 0\r\n"  # as in the lists of one class
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(flagged.encode())
    data = Voc(root=tmp_path, val=None, class_names=NAMES).dataset("train")
    assert len(data) == 3 and data.report.count("missing_image") == 0
    assert data[0].target.file == f"JPEGImages/{stem}{ending}" and data[0].target.labels.tolist() == scenes()[0].labels


def test_semantic_maps_keep_palette_values_and_ignore_borders(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes())
    data = Voc(root=tmp_path, val=None, class_names=NAMES, truth="semantic", num_workers=0)
    with pytest.raises(DataError, match="class names differ"):
        data.dataset("train")  # a map has a class for the background too
    data = Voc(root=tmp_path, val=None, class_names=["background", *NAMES], num_classes=4, truth="semantic")
    for number, scene in enumerate(scenes()):
        sample = data.dataset("train")[number]
        semantic = sample.target.semantic
        assert semantic is not None and len(sample.target) == 0
        labels = semantic.labels.numpy()
        assert set(np.unique(labels)) <= {0, 1, 2, 3, 255}
        inside = labels != 255
        np.testing.assert_array_equal(labels[inside], scene.classes[inside])
        assert bool((scene.objects[~inside] > 0).all())


def test_instances_come_from_the_object_maps(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes(), difficult=1)
    data = Voc(root=tmp_path, val=None, class_names=NAMES, truth="instances").dataset("train")
    for number, scene in enumerate(scenes()):
        target = data[number].target
        values = np.array(Image.open(tmp_path / "SegmentationObject" / f"train_{number}.png"))
        assert target.masks is not None and target.labels.tolist() == scene.labels
        for place, mask in enumerate(target.masks.numpy()):
            np.testing.assert_array_equal(mask, values == place + 1)
            rows, columns = np.nonzero(mask)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert target.boxes[place].tolist() == expected and float(target.area[place]) == mask.sum()
        assert target.difficult.tolist() == [place == 0 for place in range(len(scene.labels))]


def test_a_value_that_is_no_class_is_an_error(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes())
    file = tmp_path / "SegmentationClass" / "train_2.png"
    values = np.array(Image.open(file))
    values[0, 0] = 9
    Image.fromarray(values).save(file)
    with pytest.raises(DataError, match=r"train_2\.png: value 9 \(1 pixels\).*allowed \[0, 1, 2, 3, 255\]"):
        Voc(root=tmp_path, val=None, class_names=["background", *NAMES], truth="semantic").dataset("train")
    file.unlink()
    data = Voc(root=tmp_path, val=None, class_names=["background", *NAMES], truth="semantic").dataset("train")
    assert len(data) == 3 and data.report.count("missing_mask") == 1


def test_a_class_that_the_maps_lack_keeps_its_value_and_label(tmp_path: Path) -> None:
    write_voc(tmp_path, scenes())
    names = ["background", *NAMES, "knife"]
    data = Voc(root=tmp_path, val=None, class_names=names, truth="semantic")
    assert data.class_names == names and data.dataset("train").report.findings["absent_class"].first == ["knife"]
    for number in range(4):
        Image.fromarray(np.full((48, 64), 255, dtype=np.uint8)).save(tmp_path / f"SegmentationClass/train_{number}.png")
    with pytest.raises(DataError, match=r"every pixel of 4 maps is ignored \(values \[255\]\)"):
        Voc(root=tmp_path, val=None, class_names=names, truth="semantic").dataset("train")


@needs_shared
def test_real_blood_cells() -> None:
    data = Voc(root=SHARED / "data" / "bccd", test="test", class_names=["RBC", "WBC", "Platelets"])
    assert [len(data.dataset(split)) for split in data.splits] == [205, 87, 72]
    assert sum(report.objects for report in data.report.values()) == 4886
    assert sum(report.count("zero_area") for report in data.report.values()) == 2
    assert set().union(*(report.findings for report in data.report.values())) == {"zero_area"}
    assert data.dataset("train")[0].image.shape == (3, 480, 640)
    assert Voc(root=SHARED / "data" / "bccd").class_names == ["Platelets", "RBC", "WBC"]
