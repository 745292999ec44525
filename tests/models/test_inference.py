from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from detseg.models.inference import Inference, ask_by
from detseg.models.segmenter import SegmenterOutputs, SemanticSegmenter
from detseg.ops.dense_crf import dense_crf
from detseg.predictor import Predictor
from detseg.structures import SemanticMap, Target
from detseg.tasks import SemanticSegmentation
from fake_models import batch, loader, trainer
from segmenter_cases import maps


class Pointwise(SemanticSegmenter):
    """Two classes from a pixel's own colour: windows cannot change its answer. It counts its passes."""

    def __init__(self) -> None:
        super().__init__(num_classes=2)
        self.weight = nn.Parameter(torch.tensor([4.0, -2.0, 1.0]))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        self.seen.append(tuple(images.shape))
        score = (images * self.weight[:, None, None]).sum(1) - 1.2  # (B, H, W)
        return torch.stack([-score, score], dim=1)


def image(height: int, width: int, count: int = 1) -> Tensor:
    return F.interpolate(torch.rand(count, 3, 4, 5), (height, width), mode="bilinear")


def probabilities(inference: Inference, model: Pointwise, images: Tensor) -> list[Tensor]:
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    return list(inference(model.forward, model.forward(images), images, sizes))


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 5), (7, 1), (64, None), (13, None)])
def test_windows_of_a_pointwise_model_change_nothing(window: int, stride: int | None) -> None:
    model, images = Pointwise(), image(21, 30, count=2)
    found = probabilities(Inference(window=window, stride=stride, chunk=3), model, images)
    for own, expected in zip(found, model.forward(images).softmax(1), strict=True):
        assert_close(own, expected)


def test_overlapping_windows_are_averaged_by_hand() -> None:
    """The model answers with a window's mean: 6 pixels in windows of 4, 2 apart, begin at 0 and 2."""
    images = torch.tensor([0.0, 1, 2, 3, 4, 5]).expand(1, 3, 4, 6).contiguous()

    def ask(some: Tensor) -> Tensor:
        mean = some.mean((1, 2, 3))[:, None, None, None].expand(-1, 1, *some.shape[2:])
        return torch.cat([torch.zeros_like(mean), mean], 1)

    (found,) = Inference(window=4, stride=2)(ask, torch.zeros(1, 2, 4, 6), images, torch.tensor([[4, 6]]))
    expected = torch.tensor([1.5, 1.5, 2.5, 2.5, 3.5, 3.5]).sigmoid()  # means 1.5 and 3.5, both over the middle
    assert_close(found[1], expected.expand(4, 6))


def test_sizes_and_mirror_images_are_averaged() -> None:
    model, images = Pointwise(), image(12, 16)
    found = probabilities(Inference(scales=[0.5, 1.0, 1.5], flip=True), model, images)[0]
    assert [shape[2:] for shape in model.seen[1:]] == [(6, 8)] * 2 + [(12, 16)] * 2 + [(18, 24)] * 2
    assert_close(found, model.forward(images)[0].softmax(0), rtol=0, atol=0.15)
    flipped = probabilities(Inference(scales=[0.5, 1.0, 1.5], flip=True), model, images.flip(-1))[0]
    assert_close(found, flipped.flip(-1))
    assert_close(found.sum(0), torch.ones(12, 16))


def test_predict_asks_as_told_and_only_valid_pixels_are_looked_at() -> None:
    model, images = Pointwise(), image(16, 20, count=2)
    sizes = torch.tensor([[16, 20], [9, 11]])
    plain = model.predict(model(images, sizes), sizes)
    assert isinstance(model(images, sizes), Tensor)
    ask_by(model, Inference(window=6))
    outputs = model(images, sizes)
    assert isinstance(outputs, SegmenterOutputs) and outputs.images is images
    found = model.predict(outputs, sizes)
    assert [answer.size for answer in found] == [(16, 20), (9, 11)]
    assert all(torch.equal(one.labels, other.labels) for one, other in zip(found, plain, strict=True))
    truth = [Target(torch.zeros(0, 4), torch.zeros(0).long(), semantic=SemanticMap(answer.labels)) for answer in plain]
    assert_close(model.loss(outputs, truth), model.loss(outputs.logits, truth))
    count = len(model.seen)
    model.inference = Inference(refine=lambda logits, photo: logits.flip(0))  # no further pass where none is needed
    turned = model.predict(model(images=images, sizes=sizes), sizes)
    assert len(model.seen) == count + 1
    assert all(torch.equal(one.labels, 1 - other.labels) for one, other in zip(turned, plain, strict=True))


WHOLE, WINDOWS = (1, 3, 32, 32), [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
"""Of a photo of 21 x 30 in a batch padded to 32: one pass over all of it; 3 x 4 windows, five in a pass."""


@pytest.mark.parametrize(
    ("inference", "passes"),
    [
        (None, [WHOLE]),
        (Inference(window=8, stride=8, chunk=5), WINDOWS),
        (Inference(scales=[1.0, 2.0]), [(1, 3, 21, 30), (1, 3, 42, 60)]),
        (Inference(flip=True), [(1, 3, 21, 30)] * 2),
        (Inference(refine=lambda logits, photo: logits), [WHOLE]),  # the CRF refines the batch's own answer
    ],
)
def test_prediction_makes_no_pass_that_nobody_reads(
    inference: Inference | None, passes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Windows bound the memory of a large photo, so the photo itself must never go through the network."""
    photo = (image(21, 30)[0] * 255).to(torch.uint8)
    model = Pointwise()
    predictor = Predictor(model=model, class_names=["one", "other"])
    (expected,) = predictor(photo)
    model.inference = inference
    model.seen.clear()
    (found,) = predictor(photo)
    assert model.seen == passes
    assert (found.labels == expected.labels).float().mean() > 0.98  # blurred where it was looked at in another size
    task = SemanticSegmentation(
        model=model,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        class_names=["one", "other"],
        monitor="val/miou",
        inference=inference,
    )
    seen = batch(maps((21, 30), classes=2), side=32)
    seen.sizes[0] = torch.tensor([21, 30])
    model.seen.clear()
    trainer(tmp_path).predict(task, loader(seen))
    assert model.seen == passes
    model.seen.clear()
    trainer(tmp_path).validate(task, loader(seen), verbose=False)
    assert model.seen == (passes if passes == [WHOLE] else [WHOLE, *passes])  # the loss is that of the whole image


def test_a_crf_moves_borders_to_those_of_the_image() -> None:
    truth = torch.zeros(32, 40).long()
    truth[8:24, 10:30] = 1
    images = (truth * 0.5 + 0.2).expand(1, 3, 32, 40).contiguous()
    coarse = F.avg_pool2d(truth[None, None].float(), 9, stride=1, padding=4, count_include_pad=False)[0] * 4 - 1.4
    logits = torch.cat([-coarse, coarse])[None]  # blurred, and too large
    sizes = torch.tensor([[32, 40]])
    (plain,) = Inference()(Pointwise().forward, logits, images, sizes)
    (asked,) = Inference()(lambda some: logits, None, images, sizes)  # no logits yet: it asks for them
    assert_close(asked, plain)
    (found,) = Inference(refine=dense_crf)(Pointwise().forward, logits, images, sizes)
    assert (plain.argmax(0) == truth).float().mean() < 0.97
    assert torch.equal(found.argmax(0), truth)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 4, "stride": 5}, "no farther apart"),
        ({"scales": []}, r"scales=\[\]"),
        ({"scales": [0.0]}, "factors above 0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inference(**numbers)


def test_a_detector_cannot_be_asked_so() -> None:
    with pytest.raises(ValueError, match="Linear is no semantic segmenter"):
        ask_by(nn.Linear(2, 2), Inference())


def test_one_pixel_high() -> None:
    model, images = Pointwise(), image(1, 30)
    found = probabilities(Inference(window=8, scales=[0.5, 1.0], flip=True), model, images)[0]
    assert found.shape == (2, 1, 30)
