from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.metrics import BoundaryQuality
from detseg.metrics.boundary import borders
from detseg.structures import SemanticMap, Target


def target(labels: Tensor, image_id: int = 1) -> Target:
    none = torch.zeros((0, 4))
    return Target(boxes=none, labels=torch.zeros(0).long(), semantic=SemanticMap(labels), image_id=image_id)


def quality(pairs: list[tuple[Tensor, Tensor]], classes: int, **numbers: float) -> dict[str, Tensor]:
    metric = BoundaryQuality(class_names=[str(label) for label in range(classes)], **numbers)
    for number, (guess, truth) in enumerate(pairs):
        metric.update([SemanticMap(guess)], [target(truth, number)])
    return metric.compute()


def test_borders_by_hand() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 255, 2, 2]])
    assert borders(labels, 1).int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]]
    assert borders(labels[:, :5], 1).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0]]  # 255 is no other class
    assert borders(labels[:, :5], 2).int().tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]


def test_a_row_by_hand() -> None:
    """Two classes meet after 4 of 10 pixels in the truth, after 5 in the prediction; d is 2, the tolerance 1 pixel."""
    truth = torch.tensor([[0] * 4 + [1] * 6])
    guess = torch.tensor([[0] * 5 + [1] * 5])
    found = quality([(guess, truth)], 2, width=0.2, tolerance=0.01)
    # Bands: truth 0 at 2, 3 and 1 at 4, 5; prediction 0 at 3, 4 and 1 at 5, 6. Each class shares 1 of 3 pixels.
    assert_close(found["boundary_iou_per_class"], torch.tensor([1 / 3, 1 / 3], dtype=torch.float64))
    # Contours of 1 pixel each lie 1 apart.
    assert_close(found["boundary_f_per_class"], torch.tensor([1.0, 1.0], dtype=torch.float64))
    apart = quality([(torch.tensor([[0] * 6 + [1] * 4]), truth)], 2, width=0.2, tolerance=0.01)
    assert apart["boundary_f"] == 0 and apart["boundary_iou"] == 0


def slow(pairs: list[tuple[Tensor, Tensor]], classes: int, width: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Class by class on masks, with OpenCV's erosion as in the released code, and distances pixel by pixel.

    A pixel that does not count is in no mask, and erodes none.
    """
    iou, fair = [], []
    for label in range(classes):
        overlap = joined = band = 0
        hits, sums = [0, 0], [0, 0]
        for guess, truth in pairs:
            ignored = (truth == 255).numpy().astype(np.uint8)
            masks = [(labels == label).numpy().astype(np.uint8) * (1 - ignored) for labels in (guess, truth)]
            diagonal = math.hypot(*truth.shape)
            kernel = np.ones((3, 3), np.uint8)
            steps = max(1, round(width * diagonal))
            inner = [cv2.erode(mask | ignored, kernel, iterations=steps) for mask in masks]
            bands = [(mask & (1 - eroded)).astype(bool) for mask, eroded in zip(masks, inner, strict=True)]
            band += int(bands[1].sum())
            overlap += int((bands[0] & bands[1]).sum())
            joined += int((bands[0] | bands[1]).sum())
            lines = [np.argwhere(mask & (1 - cv2.erode(mask | ignored, kernel))) for mask in masks]
            for side, (own, other) in enumerate((lines, lines[::-1])):
                sums[side] += len(own)
                if len(other):
                    gaps = np.sqrt(((own[:, None] - other[None]) ** 2).sum(-1)).min(1)
                    hits[side] += int((gaps <= max(1.0, tolerance * diagonal)).sum())
        iou.append(overlap / joined if band else math.nan)
        precision, recall = (hit / max(1, number) for hit, number in zip(hits, sums, strict=True))
        fair.append(2 * precision * recall / max(precision + recall, 1e-300) if sums[1] else math.nan)
    return torch.tensor(iou, dtype=torch.float64), torch.tensor(fair, dtype=torch.float64)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_slow_twin(seed: int, ignored: bool) -> None:
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(3):
        height, width = (int(side) for side in generator.integers(20, 60, 2))
        maps = []
        base = generator.random((5, height // 6 + 1, width // 6 + 1)).astype(np.float32)
        for noise in (0.0, 0.35):
            rough = base + noise * generator.random(base.shape).astype(np.float32)
            maps.append(np.stack([cv2.resize(plane, (width, height)) for plane in rough]).argmax(0))
        pairs.append((torch.from_numpy(maps[1]).long(), torch.from_numpy(maps[0]).long()))
        if ignored:
            pairs[-1][1][torch.from_numpy(cv2.resize(base[0], (width, height)) > 0.6)] = 255
    found = quality(pairs, 6, width=0.04, tolerance=0.03)  # the sixth class is nowhere
    iou, fair = slow(pairs, 6, 0.04, 0.03)
    assert_close(found["boundary_iou_per_class"], iou, rtol=0, atol=0, equal_nan=True)
    assert_close(found["boundary_f_per_class"], fair, rtol=0, atol=0, equal_nan=True)
    assert_close(found["boundary_iou"], iou.nanmean())
    assert 0 < float(found["boundary_iou"]) < 1 and math.isnan(float(found["boundary_f_per_class"][5]))


def test_finer_borders_score_more_where_the_mean_iou_hardly_tells() -> None:
    truth = torch.zeros(100, 100).long()
    truth[20:80, 20:80] = 1
    near, far = torch.zeros_like(truth), torch.zeros_like(truth)
    near[21:81, 20:80] = 1
    far[26:86, 20:80] = 1
    scores = [quality([(guess, truth)], 2) for guess in (truth, near, far)]
    for name in ("boundary_iou", "boundary_f"):
        perfect, close, poor = (float(score[name]) for score in scores)
        assert perfect == 1 and perfect >= close > poor


def test_what_is_predicted_on_pixels_that_do_not_count_changes_nothing() -> None:
    truth = torch.zeros(20, 20).long()
    truth[:, 10:] = 1
    guess = truth.clone()
    guess[12:, 10:13] = 0  # so that every figure is between 0 and 1
    truth[5:9, 8:13] = 255
    found = [quality([(guess.where(truth != 255, other), truth)], 3) for other in (0, 1, 2)]
    assert 0 < float(found[0]["boundary_iou"]) < 1 and 0 < float(found[0]["boundary_f"]) < 1
    for name in ("boundary_iou_per_class", "boundary_f_per_class"):
        for other in found[1:]:
            assert_close(other[name], found[0][name], rtol=0, atol=0, equal_nan=True)


def test_a_map_without_a_pixel_that_counts_has_no_figures() -> None:
    alone = quality([(torch.zeros(4, 4).long(), torch.full((4, 4), 255))], 2)
    assert math.isnan(float(alone["boundary_iou"])) and math.isnan(float(alone["boundary_f"]))


def test_a_band_reaches_across_the_ignored_frame_of_an_object() -> None:
    """VOC frames its objects by some 5 pixels that do not count: the classes never touch, but lie within the band."""
    truth = torch.zeros(60, 80).long()  # a diagonal of 100 pixels
    truth[18:42, 18:62] = 255
    truth[22:38, 22:58] = 1
    perfect = truth.where(truth != 255, 1)
    wide = quality([(perfect, truth)], 2, width=0.05)
    assert_close(wide["boundary_iou_per_class"], torch.ones(2, dtype=torch.float64))
    worse = perfect.clone()
    worse[22:30, 22:58] = 0
    assert 0 < float(quality([(worse, truth)], 2, width=0.05)["boundary_iou_per_class"][1]) < 0.9
    narrow = quality([(perfect, truth)], 2, width=0.04)  # 4 pixels, which end within the frame
    assert narrow["boundary_iou_per_class"].isnan().all()


def test_bad_input_names_the_image() -> None:
    metric = BoundaryQuality(class_names=["a", "b"])
    with pytest.raises(ValueError, match="image 7: the prediction holds label 2; it must be"):
        metric.update([SemanticMap(torch.tensor([[2]]))], [target(torch.tensor([[0]]), 7)])
    with pytest.raises(ValueError, match=r"image 3: the prediction is \(1, 2\), the truth \(1, 1\)"):
        metric.update([SemanticMap(torch.tensor([[0, 0]]))], [target(torch.tensor([[0]]), 3)])
    with pytest.raises(ValueError, match=r"width=1\.5"):
        BoundaryQuality(class_names=["a"], width=1.5)
