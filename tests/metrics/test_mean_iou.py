from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from detseg.metrics import MeanIoU
from detseg.metrics.mean_iou import confusion_matrix
from detseg.structures import SemanticMap, Target


def target(labels: torch.Tensor, image_id: int = 1) -> Target:
    none = torch.zeros((0, 4))
    return Target(
        boxes=none, labels=torch.zeros(0).long(), semantic=SemanticMap(labels), image_id=image_id, file="b.png"
    )


def test_by_hand() -> None:
    #            truth   0 0 1 1 1 2 255 255
    #       prediction   0 1 1 1 0 2 0   2
    # matrix: 0: (1, 1, 0); 1: (1, 2, 0); 2: (0, 0, 1). Class 3 is nowhere.
    truth = torch.tensor([[0, 0, 1, 1], [1, 2, 255, 255]])
    guess = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2]])
    metric = MeanIoU(num_classes=4)
    metric.update([SemanticMap(guess)], [target(truth)])
    result = metric.compute()
    assert metric.confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    nan = math.nan
    expected = {
        "iou_per_class": [1 / 3, 2 / 4, 1, nan],
        "dice_per_class": [2 / 4, 4 / 6, 1, nan],
        "accuracy_per_class": [1 / 2, 2 / 3, 1, nan],
        "miou": (1 / 3 + 1 / 2 + 1) / 3,
        "dice": (1 / 2 + 2 / 3 + 1) / 3,
        "pixel_accuracy": 4 / 6,
        "mean_class_accuracy": (1 / 2 + 2 / 3 + 1) / 3,
        "fw_iou": 2 / 6 * 1 / 3 + 3 / 6 * 1 / 2 + 1 / 6,
    }
    for key, value in expected.items():
        torch.testing.assert_close(result[key], torch.tensor(value, dtype=torch.float64), equal_nan=True)
    assert result["count_per_class"].tolist() == [2, 3, 1, 0] and int(result["count"]) == 6


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = MeanIoU(num_classes=6)
    theirs = MulticlassJaccardIndex(num_classes=6, ignore_index=255, average=None)
    mean = MulticlassJaccardIndex(num_classes=6, ignore_index=255)
    for image in range(5):
        truth = torch.randint(0, 6, (13, 17 + image), generator=generator)
        guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, truth.flip(0))
        truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
        ours.update([SemanticMap(guess)], [target(truth, image)])
        theirs.update(guess[None], truth[None])
        mean.update(guess[None], truth[None])
    result = ours.compute()
    torch.testing.assert_close(result["iou_per_class"].float(), theirs.compute(), rtol=0, atol=1e-6)
    torch.testing.assert_close(result["miou"].float(), mean.compute(), rtol=0, atol=1e-6)


def test_images_are_counted_together_not_averaged() -> None:
    # Image 1: 1 of 2 pixels of class 1; image 2: 8 of 8. Over the data set 9 of 10, not the mean 0.75.
    metric = MeanIoU(num_classes=2)
    first = torch.tensor([[1, 1]])
    metric.update([SemanticMap(torch.tensor([[1, 0]]))], [target(first)])
    metric.update([SemanticMap(torch.ones((2, 4)).long())], [target(torch.ones((2, 4)).long(), 2)])
    result = metric.compute()
    assert float(result["iou_per_class"][1]) == pytest.approx(0.9)
    assert math.isnan(result["iou_per_class"][0])  # predicted, yet never there: n/a, not 0


def test_images_of_several_sizes_in_one_batch() -> None:
    maps = [torch.randint(0, 3, (4, 5)), torch.randint(0, 3, (7, 2))]
    metric = MeanIoU(class_names=["a", "b", "c"])
    metric.update([SemanticMap(labels) for labels in maps], [target(labels, i) for i, labels in enumerate(maps)])
    assert float(metric.compute()["miou"]) == 1 and int(metric.compute()["count"]) == 34


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_counted_is_not_a_number() -> None:
    metric = MeanIoU(num_classes=2)
    metric.update([], [])
    metric.update([SemanticMap(torch.full((2, 2), 7))], [target(torch.full((2, 2), 255))])  # ignored: any label goes
    result = metric.compute()
    for key in ("miou", "dice", "pixel_accuracy", "mean_class_accuracy", "fw_iou"):
        assert math.isnan(result[key]), key
    assert int(result["count"]) == 0


def test_another_ignore_index() -> None:
    metric = MeanIoU(num_classes=3, ignore_index=0)
    metric.update([SemanticMap(torch.tensor([[2, 1, 1]]))], [target(torch.tensor([[0, 1, 2]]))])
    assert metric.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_wrong_maps_name_the_image() -> None:
    metric = MeanIoU(num_classes=3)
    good, bad = torch.zeros((2, 2)).long(), torch.full((2, 2), 3)
    with pytest.raises(ValueError, match=r"image 8 \(b.png\): the prediction holds label 3; it must be 0\.\.2"):
        metric.update([SemanticMap(good), SemanticMap(bad)], [target(good, 7), target(good, 8)])
    with pytest.raises(ValueError, match=r"image 9 \(b.png\): the truth holds label 3"):
        metric.update([SemanticMap(good)], [target(bad, 9)])
    with pytest.raises(ValueError, match=r"image 9 .*\(2, 2\), the truth \(2, 3\)"):
        metric.update([SemanticMap(good)], [target(torch.zeros((2, 3)).long(), 9)])
    missing = target(good, 9)
    missing.semantic = None
    with pytest.raises(ValueError, match=r"image 9 .*no semantic map"):
        metric.update([SemanticMap(good)], [missing])
    with pytest.raises(ValueError, match="predictions of 1 images, but targets of 0"):
        metric.update([SemanticMap(good)], [])
    assert int(metric.confusion.sum()) == 0


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="num_classes >= 1 or class_names"):
        MeanIoU()
    with pytest.raises(ValueError, match="2 class names"):
        MeanIoU(num_classes=3, class_names=["a", "b"])


def test_confusion_matrix_equals_a_loop() -> None:
    truth, guess = torch.randint(0, 4, (50,)), torch.randint(0, 4, (50,))
    truth[::7] = 255
    expected = torch.zeros((4, 4), dtype=torch.int64)
    for t, g in zip(truth.tolist(), guess.tolist(), strict=True):
        if t != 255:
            expected[t, g] += 1
    torch.testing.assert_close(confusion_matrix(guess, truth, 4), expected)
