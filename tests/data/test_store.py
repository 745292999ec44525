from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.store import AnnotationStore, Texts
from detseg.ops import rle


def example() -> AnnotationStore:
    """Two images and an empty one; a polygon, a code, a crowd, and a box alone."""
    builder = StoreBuilder(source="x", categories={5: "a", 9: "b"})
    for number, size in enumerate([(20, 30), (10, 12), (8, 8)]):
        builder.add_image(f"{number}.png", 100 + number, size)
    code = rle.encode(torch.ones((1, 10, 12), dtype=torch.bool))[0]["counts"]
    builder.add(RawObject(1, [0, 0, 12, 10], 9, "annotation 3", code=code, iscrowd=True))
    builder.add(RawObject(0, [2, 3, 12, 13], 5, "annotation 1", area=70.0, rings=[[2, 3, 12, 3, 12, 13, 2, 13]]))
    builder.add(RawObject(1, [1, 1, 4, 4], 5, "annotation 0", difficult=True))
    builder.add(RawObject(0, [4, 5, 8, 9], 9, "annotation 2", rings=[[4, 5, 8, 5, 8, 9, 4, 9]]))
    return builder.build()


def test_texts_hold_strings() -> None:
    strings = ["", "a/b.png", "ünï 漢字.jpg", ""]
    texts = Texts.of(strings)
    assert [texts[index] for index in range(len(texts))] == strings
    assert len(Texts.of([])) == 0


def test_targets_come_out_by_image() -> None:
    store = example()
    first, second, empty = (store.target(index, masks=True) for index in range(3))
    assert first.boxes.tolist() == [[2, 3, 12, 13], [4, 5, 8, 9]] and first.labels.tolist() == [0, 1]
    assert first.area.tolist() == [70.0, 16.0]  # the file's, else the mask's
    assert first.masks is not None and first.masks.flatten(1).sum(dim=1).tolist() == [100, 16]
    assert bool(first.masks[1, 5:9, 4:8].all())
    assert second.iscrowd.tolist() == [True, False] and second.difficult.tolist() == [False, True]
    assert second.masks is not None and second.masks.flatten(1).sum(dim=1).tolist() == [120, 0]  # a box alone: empty
    assert second.area.tolist() == [120.0, 9.0]
    assert (second.image_id, second.size, second.file) == (101, (10, 12), "1.png")
    assert len(empty) == 0 and empty.masks is not None and empty.masks.shape == (0, 8, 8)
    assert store.category_ids.tolist() == [5, 9] and store.class_names[1] == "b"


def test_paint_puts_small_objects_on_top_and_ignores_crowds() -> None:
    store = example()
    labels = store.paint(0).labels
    assert labels.flatten().bincount().tolist() == [600 - 100, 84, 16]
    assert int(labels[6, 6]) == 2 and int(labels[4, 3]) == 1
    assert bool((store.paint(1).labels == 255).all())
    assert int(store.paint(2).labels.sum()) == 0


def test_a_target_is_a_copy() -> None:
    store = example()
    store.target(0).boxes.zero_()
    assert store.target(0).boxes.tolist()[0] == [2, 3, 12, 13]


def test_the_store_is_flat_arrays_and_survives_pickle_and_arrays() -> None:
    store = example()
    for field in fields(store):
        value = getattr(store, field.name)
        assert isinstance(value, Texts) or value.dtype != np.dtype(object)
    for copy in (pickle.loads(pickle.dumps(store)), AnnotationStore.from_arrays(store.arrays())):
        for index in range(3):
            assert_close(copy.target(index, masks=True).masks, store.target(index, masks=True).masks)
            assert copy.target(index).file == store.target(index).file
    per_object = sum(array.nbytes for array in store.arrays().values()) / 4
    assert per_object < 250


@pytest.mark.parametrize("index", [0, 1])
def test_masks_agree_with_the_codes(index: int) -> None:
    store = example()
    size = store.size(index)
    for row, mask in zip(store.objects(index), store.masks(index), strict=True):
        code = store.code(row, size)
        assert int(mask.sum()) == (0 if code is None else int(rle.areas([code])[0]))
