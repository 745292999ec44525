from __future__ import annotations

import math

import pytest

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import DataError


def builder(**options: object) -> StoreBuilder:
    made = StoreBuilder(source="x.json", categories={1: "cat", 4: "dog"}, **options)  # type: ignore[arg-type]
    made.add_image("a.png", 0, (20, 30))
    made.add(RawObject(0, [1, 1, 5, 5], 1, "annotation 0"))
    return made


FAULTS = {
    "zero_area": [[3, 3, 3, 8], [3, 3, 3, 3], [2, 7, 9, 7]],
    "not_finite": [[math.nan, 0, 4, 4], [0, 0, math.inf, 4], [0, -math.inf, 4, 4]],
    "inverted": [[9, 3, 4, 8], [3, 9, 8, 4]],
    "outside": [[30, 0, 40, 5], [-8, 2, 0, 6], [4, 20, 9, 28], [4, -9, 9, -1]],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_boxes_beyond_repair_are_dropped_and_reported(kind: str) -> None:
    made = builder()
    for number, box in enumerate(FAULTS[kind], start=1):
        made.add(RawObject(0, box, 4, f"annotation {number}"))
    store = made.build()
    assert len(store.labels) == 1 and made.report.objects == 1
    assert made.report.count(kind) == len(FAULTS[kind])
    assert set(made.report.findings) == {kind}
    assert "annotation 1 of a.png xyxy [" in made.report.findings[kind].first[0]


def test_boxes_are_clipped_and_reported_beyond_rounding() -> None:
    made = builder()
    made.add(RawObject(0, [-4, 2, 10, 25], 1, "annotation 1"))
    made.add(RawObject(0, [0, 0, 30.005, 20], 1, "annotation 2"))  # two decimals, rounded up
    store = made.build()
    assert store.boxes[1].tolist() == [0, 2, 10, 20] and store.boxes[2].tolist() == [0, 0, 30, 20]
    assert made.report.count("clipped") == 1 and "annotation 1" in made.report.findings["clipped"].first[0]


def test_a_box_that_single_precision_cannot_hold_is_dropped() -> None:
    made = builder()
    made.add(RawObject(0, [29.9999999, 2, 35, 5], 1, "annotation 1"))
    assert len(made.build().labels) == 1 and made.report.count("outside") == 1


def test_unknown_and_unwanted_classes_are_told_apart() -> None:
    made = builder(wanted=["dog"])  # which leaves the cat out
    made.add(RawObject(0, [1, 1, 5, 5], 2, "annotation 7"))
    made.add(RawObject(0, [1, 1, 5, 5], 4, "annotation 8"))
    store = made.build()
    assert store.labels.tolist() == [0] and store.category_ids.tolist() == [4]
    assert made.report.count("unknown_category") == 1 and made.report.count("other_class") == 1
    assert "annotation 7 of a.png: 2; known: 1, 4" in made.report.findings["unknown_category"].first[0]


def test_order_of_wanted_names_is_the_order_of_labels() -> None:
    made = builder(wanted=["dog", "cat"])
    store = made.build()
    assert store.labels.tolist() == [1] and store.category_ids.tolist() == [4, 1]


def test_masks_are_needed_only_where_asked_for() -> None:
    made = builder(need_masks=True)
    made.add(RawObject(0, [1, 1, 5, 5], 1, "annotation 2", rings=[[1, 1, 5, 1, 5, 5]]))
    made.add(RawObject(0, [1, 1, 5, 5], 1, "annotation 3", rings=[[1, 1, 5, 1], [1, 1, 5, 1, math.nan, 5]]))
    assert len(made.build().labels) == 1
    assert made.report.count("no_mask") == 2 and made.report.count("bad_polygon") == 2


def test_a_missing_box_is_that_of_the_polygons() -> None:
    made = builder()
    made.add(RawObject(0, None, 1, "annotation 2", rings=[[1, 2, 5, 2, 5, 9], [7, 3, 8, 3, 8, 4]]))
    assert made.build().boxes[1].tolist() == [1, 2, 8, 9]


def test_nothing_to_learn_from_is_an_error_with_both_lists() -> None:
    made = StoreBuilder(source="x.json", categories={1: "cat", 4: "dog"}, wanted=["dog"])
    made.add_image("a.png", 0, (20, 30))
    made.add(RawObject(0, [1, 1, 5, 5], 1, "annotation 0"))
    with pytest.raises(DataError, match=r"1 images, 0 objects") as caught:
        made.build()
    assert "wanted: ['dog']; found: ['cat', 'dog']" in str(caught.value)
    assert "object of a class that was not asked for" in str(caught.value)
    assert len(made.build(allow_empty=True).labels) == 0
    with pytest.raises(DataError, match="0 images"):
        StoreBuilder(source="y", categories={1: "cat"}).build(allow_empty=True)


def test_names_must_be_known_and_differ() -> None:
    with pytest.raises(DataError, match=r"no classes named \['cow'\].*found: \['cat'\]"):
        StoreBuilder(source="x", categories={1: "cat"}, wanted=["cow"])
    with pytest.raises(DataError, match=r"\['cat'\] stand for several"):
        StoreBuilder(source="x", categories={1: "cat", 2: "cat"})
