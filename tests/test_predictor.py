from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from detseg.data import DataError, DetectionEval, SemanticEval
from detseg.predictor import Predictor, as_image
from fake_models import FakeRegions, GridProposer
from tiny_models import BrightBox, BrightMap

BOX = (30, 20, 150, 80)  # x1, y1, x2, y2 in a photo of 200 x 100


def photo() -> torch.Tensor:
    image = torch.zeros((3, 100, 200), dtype=torch.uint8)
    image[:, BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return image


def predictor(kind=BrightBox, transform=None) -> Predictor:
    return Predictor(model=kind(num_classes=2), class_names=["cat", "dog"], category_ids=[3, 7], transform=transform)


@pytest.mark.parametrize("size", [None, (50, 100), (80, 80)])
def test_answers_are_in_the_photos_own_pixels(size):
    transform = None if size is None else DetectionEval(size=size)
    found = predictor(transform=transform)(photo())
    assert len(found) == 1
    assert_close(found[0].boxes, torch.tensor([BOX]).float(), rtol=0, atol=2.0)  # a pixel of the small image
    assert found[0].masks.shape == (1, 100, 200)
    inside = photo()[0] > 0
    overlap = (found[0].masks[0] & inside).sum() / (found[0].masks[0] | inside).sum()
    assert overlap > 0.95


def test_maps_are_in_the_photos_own_pixels():
    found = predictor(BrightMap, SemanticEval(size=(50, 100)))(photo())[0]
    assert found.size == (100, 200)
    assert (found.labels == (photo()[0] > 0)).float().mean() > 0.98


def test_files_arrays_and_tensors_agree(tmp_path):
    array = photo().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "photo.png")
    ours = predictor()
    answers = ours([tmp_path / "photo.png", str(tmp_path / "photo.png"), array, photo()], batch_size=3)
    assert len(answers) == 4
    for answer in answers:
        assert_close(answer.boxes, torch.tensor([BOX]).float(), rtol=0, atol=0)
    assert len(ours(tmp_path / "photo.png")) == 1


def test_photos_of_different_sizes_in_one_batch():
    small = torch.full((3, 33, 21), 255, dtype=torch.uint8)
    dark = torch.zeros((3, 40, 300), dtype=torch.uint8)
    first, second, third = predictor()([small, photo(), dark])
    assert first.boxes.tolist() == [[0, 0, 21, 33]]  # the padding is not bright
    assert second.boxes.tolist() == [list(map(float, BOX))]
    assert len(third) == 0 and third.masks.shape == (0, 40, 300)


def test_no_photos_give_no_answers():
    assert predictor()([]) == []


def test_what_is_no_photo_is_named():
    with pytest.raises(ValueError, match=r"photo 1 is \(3, 4, 4\) torch.float32; give a file"):
        predictor()([photo(), torch.rand(3, 4, 4)])
    with pytest.raises(ValueError, match=r"photo 0 is \(4, 4\) uint8"):
        as_image(np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"missing\.jpg: no such image file"):
        predictor()("missing.jpg")


def test_names_must_fit_the_model():
    with pytest.raises(ValueError, match=r"model has 2 classes, there are 1 names \(cat\) and 1 category ids"):
        Predictor(model=BrightBox(num_classes=2), class_names=["cat"])
    with pytest.raises(ValueError, match="3 category ids"):
        Predictor(model=BrightBox(num_classes=2), class_names=["cat", "dog"], category_ids=[1, 2, 3])


def test_it_is_in_eval_mode_and_moves_as_a_whole():
    ours = predictor()
    assert not ours.model.training
    assert ours.device == torch.device("cpu")
    assert ours.to(torch.float64).model.head.weight.dtype == torch.float64


@pytest.mark.parametrize("size", [None, (50, 100)])
def test_proposals_are_of_the_photo_as_it_is(size):
    """A model that is given its regions gets those of the photo, resized with it, as in training."""
    transform = None if size is None else DetectionEval(size=size)
    model = FakeRegions()
    ours = Predictor(model=model, class_names=["cat", "dog"], transform=transform)
    dark, bright = photo(), torch.full((3, 30, 40), 9, dtype=torch.uint8)  # GridProposer finds nothing in the first
    found = ours([dark, bright])
    assert [len(one) for one in found] == [0, 4]
    assert_close(found[1].boxes, GridProposer()(bright))
    (given,) = model.given
    scale = torch.ones(4) if size is None else torch.tensor([100 / 40, 50 / 30] * 2)
    assert given is not None and given[0].shape == (0, 4)
    assert_close(given[1], GridProposer()(bright) * scale)
