from __future__ import annotations

import pytest

from detseg.data.check import FIRST_FEW, DataError, Report, check_classes


def test_report_counts_per_kind_and_names_the_first_few() -> None:
    report = Report("a.json", images=3, objects=9)
    for number in range(FIRST_FEW + 2):
        report.add("clipped", f"annotation {number}")
    report.add("zero_area", "annotation 40")
    text = str(report)
    assert report.count("clipped") == FIRST_FEW + 2 and report.count("inverted") == 0
    assert "a.json: 3 images, 9 objects" in text and "annotation 4; ..." in text and "annotation 5" not in text
    assert "1 x box without area, dropped: annotation 40" in text
    assert Report.from_json(report.to_json()) == report


def test_images_without_objects_are_no_fault() -> None:
    report = Report("a")
    report.add("no_objects", "1.png")
    assert report.clean
    report.add("clipped", "annotation 1")
    assert not report.clean
    with pytest.raises(KeyError, match="cliped"):
        report.add("cliped", "annotation 1")


def test_class_mismatch_shows_both_numbers_and_both_lists() -> None:
    check_classes(source="x", found=["a", "b"], wanted=["a", "b"], num_classes=2)
    with pytest.raises(DataError) as caught:
        check_classes(source="x", found=["a", "b"], wanted=["a", "b", "c"], num_classes=3)
    assert "num_classes=3" in str(caught.value) and "2 classes" in str(caught.value)
    assert "['a', 'b', 'c']" in str(caught.value) and "['a', 'b']" in str(caught.value)
    with pytest.raises(DataError, match=r"wanted: \['b', 'a'\]; found: \['a', 'b'\]"):
        check_classes(source="x", found=["a", "b"], wanted=["b", "a"], num_classes=None)
    with pytest.raises(DataError, match="wanted: not given"):
        check_classes(source="x", found=["a"], wanted=None, num_classes=3)
