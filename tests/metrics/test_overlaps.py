from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from detseg.metrics import overlaps
from detseg.metrics.overlaps import Pairs, box_iou, box_pairs, mask_iou, pack_masks, packed_areas, same_group
from metric_oracles import blobs, draw_boxes


def test_box_iou_equals_pycocotools_in_every_bit() -> None:
    random = np.random.default_rng(0)
    boxes = draw_boxes(random, 200, 200, whole=False).astype(np.float32).astype(np.float64)
    others = draw_boxes(random, 50, 200, whole=False).astype(np.float32).astype(np.float64)
    crowd = random.random(50) < 0.3
    theirs = rle.iou(to_xywh(boxes), to_xywh(others), crowd.astype(np.uint8))
    n, g = np.nonzero(np.ones((200, 50), dtype=bool))
    assert (box_iou(boxes[n], others[g], crowd[g]).reshape(200, 50) == theirs).all()
    assert (theirs > 0.5).sum() > 20


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def test_box_iou_by_hand() -> None:
    boxes = np.array([[0, 0, 9, 9], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5], [0, 0, 10, 10]], dtype=float)
    others = np.array([[0, 0, 9, 4], [5, 0, 15, 10], [5, 0, 15, 10], [5, 5, 5, 5], [10, 0, 20, 10]], dtype=float)
    crowd = np.array([False, False, True, False, False])
    # 36 / 81; 50 / (100 + 100 - 50); 50 / 100; nothing in nothing; edges that touch
    np.testing.assert_allclose(box_iou(boxes, others, crowd), [4 / 9, 1 / 3, 0.5, 0, 0], rtol=1e-15)
    # with pixels inside both ends: 10 x 5 of 10 x 10
    assert box_iou(boxes[:1], others[:1], crowd[:1], pixel=1.0)[0] == 0.5


@pytest.mark.parametrize("side", [5, 8, 33])
def test_mask_iou_equals_pycocotools_in_every_bit(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "MASK_CHUNK", 64)  # many chunks
    random = np.random.default_rng(side)
    masks = blobs(random, draw_boxes(random, 30, side, whole=False), side)
    others = blobs(random, draw_boxes(random, 8, side, whole=False), side)
    crowd = random.random(8) < 0.4
    n, g = np.nonzero(np.ones((30, 8), dtype=bool))
    packed, packed_others = pack_masks(masks), pack_masks(others)
    theirs = rle.iou(encode(masks), encode(others), crowd.astype(np.uint8))
    assert (mask_iou(packed, packed_others, n, g, crowd).reshape(30, 8) == theirs).all()
    assert packed_areas(packed).tolist() == masks.flatten(1).sum(1).tolist()


def encode(masks: torch.Tensor) -> list[dict[str, object]]:
    return rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_same_group_gives_every_pair_once(chunk: int) -> None:
    random = np.random.default_rng(1)
    group, truth_group = random.integers(0, 5, 40), random.integers(0, 7, 13)
    parts = list(same_group(group, truth_group, chunk))
    found = {(int(d), int(t)) for detection, truth in parts for d, t in zip(detection, truth, strict=True)}
    expected = {(d, t) for d in range(40) for t in range(13) if group[d] == truth_group[t]}
    assert found == expected
    assert sum(len(detection) for detection, _ in parts) == len(expected)
    assert len(parts) > 1 or chunk == 1000


def test_box_pairs_keep_what_overlaps_enough() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10.0]])
    pairs = box_pairs(boxes, np.array([4, 4, 5]), boxes[:1], np.array([4]), np.zeros(1, dtype=bool), minimum=0.5)
    assert (pairs.detection.tolist(), pairs.truth.tolist(), pairs.iou.tolist()) == ([0, 1], [0, 0], [1.0, 0.5])
    assert len(Pairs.join([])) == 0
