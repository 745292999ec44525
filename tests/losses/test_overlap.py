from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from detseg.losses import (
    DiceLoss,
    JaccardLoss,
    LovaszLoss,
    TverskyLoss,
    dice_scores,
    lovasz_softmax,
    tversky_scores,
)
from detseg.losses.segmentation import class_sums


def soft(*likely: float) -> torch.Tensor:
    """Return logits ``(1, 2, 1, W)`` that give class 1 the wanted probabilities."""
    second = torch.tensor(likely, dtype=torch.float64).logit()
    return torch.stack([torch.zeros_like(second), second])[None, :, None]


LABELS = torch.tensor([[[1, 1, 0, 255]]])
LOGITS = soft(0.8, 0.6, 0.3, 0.9)  # both 1.4, predicted 1.7, truth 2 of class 1


def test_scores_by_hand():
    def first(scores: torch.Tensor) -> float:
        return float(scores[1])

    assert first(dice_scores(LOGITS, LABELS, smooth=0.0)) == pytest.approx(2.8 / 3.7)
    assert first(dice_scores(LOGITS, LABELS, smooth=1.0)) == pytest.approx(3.8 / 4.7)
    assert first(dice_scores(LOGITS, LABELS, smooth=0.0, squared=True)) == pytest.approx(2.8 / (1.09 + 2))
    assert first(tversky_scores(LOGITS, LABELS, alpha=1, beta=1, smooth=0.0)) == pytest.approx(1.4 / 2.3)
    assert first(tversky_scores(LOGITS, LABELS, alpha=0.3, beta=0.7, smooth=0.5)) == pytest.approx(
        1.9 / (1.9 + 0.3 * 0.3 + 0.7 * 0.6)
    )
    assert_close(
        tversky_scores(LOGITS, LABELS, smooth=0.5), dice_scores(LOGITS, LABELS, smooth=1.0)
    )  # Dice is Tversky at one half


@pytest.mark.parametrize("squared", [False, True])
def test_sums_equal_those_of_one_hot_maps(squared):
    logits, labels = torch.randn(2, 5, 7, 6), torch.randint(0, 4, (2, 7, 6))  # class 4 is absent
    labels[1, 2:5] = 255
    valid = (labels != 255)[:, None].double()
    likely = logits.double().softmax(dim=1) * valid
    truth = torch.stack([(labels == label).double() for label in range(5)], dim=1)
    expected = [likely * truth, likely**2 if squared else likely, truth]
    found = class_sums(logits, labels, squared=squared)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs.sum(dim=(0, 2, 3)).float())


def test_two_million_pixels_of_a_class_lose_no_digits():
    """Added up one by one in float32, each 0.98 would count as 1 beyond 1,048,576."""
    logits = torch.tensor([0.0, math.log(0.02 / 0.98)])[None, :, None, None].expand(1, 2, 1024, 2048)
    both, predicted, truth = class_sums(logits, torch.zeros(1, 1024, 2048, dtype=torch.int64))
    assert truth.tolist() == [2**21, 0]
    assert_close(both[0], torch.tensor(0.98 * 2**21))
    assert_close(predicted, torch.tensor([0.98, 0.02]) * 2**21)


@pytest.mark.parametrize(
    ("loss", "most"), [(DiceLoss(), 1.2), (DiceLoss(squared=True), 1.2), (TverskyLoss(), 1.2), (LovaszLoss(), 2.4)]
)
def test_the_backward_pass_keeps_few_maps_of_the_size_of_the_logits(loss, most):
    """The softmax, and Lovasz's slopes beside it; maps of single classes and pixels come on top."""
    logits, labels = torch.randn(1, 40, 24, 24, requires_grad=True), torch.randint(0, 40, (1, 24, 24))
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        value = next(iter(loss(logits, labels).values()))
    assert 1 <= sum(kept.values()) / (4 * logits.numel()) <= most, value


def test_losses_average_the_chosen_classes():
    assert float(DiceLoss(smooth=0.0, classes=[1])(LOGITS, LABELS)["loss_dice"]) == pytest.approx(1 - 2.8 / 3.7)
    zero = 2 * 0.7 / (1.3 + 1)  # of class 0
    both = DiceLoss(smooth=0.0, weight=3.0)(LOGITS, LABELS)["loss_dice"]
    assert float(both) == pytest.approx(3 * (1 - (2.8 / 3.7 + zero) / 2))
    squared = DiceLoss(smooth=0.0, squared=True, classes=[1])(LOGITS, LABELS)["loss_dice"]
    assert float(squared) == pytest.approx(1 - 2.8 / 3.09)
    jaccard = JaccardLoss(smooth=0.0, classes=[1])(LOGITS, LABELS)["loss_jaccard"]
    assert float(jaccard) == pytest.approx(1 - 1.4 / 2.3)
    tversky = TverskyLoss(smooth=0.0, classes=[1])(LOGITS, LABELS)["loss_tversky"]
    assert float(tversky) == pytest.approx(1 - 1.4 / (1.4 + 0.3 * 0.3 + 0.7 * 0.6))


def test_lovasz_is_the_jaccard_loss_on_hard_maps():
    """At the corners of the cube of errors the extension equals the loss that it extends (definition 1)."""
    labels = torch.tensor([[[1, 1, 0, 0]]])
    for guess in itertools.product((0, 1), repeat=4):
        logits = torch.where(
            torch.tensor(guess)[None, None, None] == torch.tensor([0, 1])[None, :, None, None], 60.0, 0.0
        )
        expected = []
        for label in (0, 1):
            truth, found = labels.flatten() == label, torch.tensor(guess) == label
            expected.append(1 - (truth & found).sum() / (truth | found).sum())
        assert_close(lovasz_softmax(logits, labels), torch.stack(expected).mean(), atol=1e-6, rtol=0)


def test_lovasz_by_hand_between_the_corners():
    # Class 1, errors 0.2, 0.4 of its two pixels and 0.3 of the other, sorted 0.4, 0.3, 0.2; Jaccard losses when the
    # first, two, three are wrong: 1 - 1/2, 1 - 1/3, 1 - 0/3
    expected = 0.4 * 0.5 + 0.3 * (2 / 3 - 0.5) + 0.2 * (1 - 2 / 3)
    assert float(lovasz_softmax(LOGITS, LABELS, classes=[1])) == pytest.approx(expected)
    assert float(LovaszLoss(classes=[1], weight=2.0)(LOGITS, LABELS)["loss_lovasz"]) == pytest.approx(2 * expected)


def test_lovasz_leaves_absent_classes_out():
    logits = torch.randn(1, 5, 3, 4)
    labels = torch.randint(0, 2, (1, 3, 4))
    assert_close(lovasz_softmax(logits, labels), lovasz_softmax(logits, labels, classes=[0, 1]))
    assert float(lovasz_softmax(logits, labels, classes=[3])) == 0.0


@pytest.mark.parametrize(
    "loss", [DiceLoss(), DiceLoss(squared=True, smooth=0.0), JaccardLoss(), TverskyLoss(smooth=0.0), LovaszLoss()]
)
def test_gradients(loss):
    logits = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1], [255, 1]], [[1, 0], [0, 0]]])  # class 2 is absent
    assert torch.autograd.gradcheck(lambda x: next(iter(loss(x, labels).values())), logits)


def test_errors():
    with pytest.raises(ValueError, match="smooth -1"):
        JaccardLoss(smooth=-1)
    with pytest.raises(ValueError, match=r"names class 2, but the model has 2: 0\.\.1"):
        DiceLoss(classes=[2])(LOGITS, LABELS)
    with pytest.raises(ValueError, match="names class 7, but the model has 2"):
        LovaszLoss(classes=[7])(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"the truth holds label 1, but the model has 1: 0\.\.0"):
        LovaszLoss()(LOGITS[:, :1], LABELS)
    with pytest.raises(ValueError, match="alpha 0 and beta 0"):
        TverskyLoss(alpha=0, beta=0)
