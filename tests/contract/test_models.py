"""The contract of ``detseg.models.contract``, held against every YAML of ``conf/model``, found by glob.

The paper's forms are large: they get what one forward and backward pass can show. The small ones are trained too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.data.orchard import OrchardDataset
from detseg.metrics import CocoAP, MeanIoU
from detseg.models.contract import Detector, Segmenter
from detseg.models.localiser import Localiser, largest_object
from detseg.models.segmenter import logits_of
from detseg.structures import Detections, SemanticMap, Target

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
SMALL = [name for name in NAMES if name.endswith("_small")]
SIZES = torch.tensor([[32, 64], [25, 50]])  # valid height and width; both images are padded to 32 x 64
NORM_OR_DROPOUT = ("Norm", "Dropout", "DropPath")
FIXED_SIZE = ("yolo_v1",)  # fully connected layers take images of one size alone
COARSE = {
    "dilated_small": 0.8,
    "fcn16s_small": 0.8,
    "fcn32s_small": 0.55,
    "sliding_window_small": 0.8,
}
"""Segmenters whose logits are too coarse to learn fruit of a few pixels by heart: what mean IoU they reach."""
HUGE = ("deconvnet", "dilated", "fcn32s", "fcn16s", "fcn8s")
"""Over a hundred million parameters, half a minute per gradient: that of no objects is left to their small forms."""
STEPS = 240  # two images must be known by heart after so many


@cache
def config(name: str) -> tuple[dict[str, Any], str]:
    """Return the model's section, without published weights, and which truth its task asks for."""
    cfg = load_config(f"model={name}")
    cfg.data.num_classes = 5 if cfg.truth == "semantic" else 3
    section = OmegaConf.to_container(cfg.model, resolve=True)
    if name in FIXED_SIZE:  # built for the images of these tests
        section["image_size"] = list(images().shape[2:])
    return without_weights(section), cfg.truth


def without_weights(node: Any) -> Any:
    """Weights named by a string would be downloaded; lists of numbers of that name are box coders' and stay."""
    if isinstance(node, dict):
        return {
            key: None if key == "weights" and isinstance(value, str) else without_weights(value)
            for key, value in node.items()
        }
    return node


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return instantiate(config(name)[0], path="model")


@lru_cache(maxsize=1)  # the tests of one model follow each other, see conftest
def shared(name: str) -> Any:
    """Return one model per name for the tests that do not train it, in evaluation mode."""
    return build(name).eval()


@lru_cache(maxsize=1)
def plain(name: str) -> Any:
    """Return the outputs of ``shared(name)`` for ``images()`` without truth."""
    with torch.no_grad():
        return shared(name)(images(), SIZES)


def truth(name: str) -> str:
    return config(name)[1]


def objects(name: str, *, empty: bool) -> list[Target]:
    """Return truth for the images of ``SIZES``: two boxes in the first and one in the second, or none at all."""
    boxes = [torch.tensor([[4.0, 4, 30, 28], [36, 10, 54, 31]]), torch.tensor([[5.0, 2, 45, 20]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    return [
        fill(name, row[:0] if empty else row, label[:0] if empty else label, (int(height), int(width)))
        for row, label, (height, width) in zip(boxes, labels, SIZES.tolist(), strict=True)
    ]


def fill(name: str, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Target:
    """Add filled boxes as masks or as a semantic map; without objects the map is all unlabelled."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    semantic = torch.full(size, 255 if len(boxes) == 0 else 0)
    for mask, label, (left, top, right, bottom) in zip(masks, labels, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
        semantic[mask] = int(label) + 2
    return Target(
        boxes=boxes,
        labels=labels,
        masks=masks if truth(name) == "instances" else None,
        semantic=SemanticMap(semantic) if truth(name) == "semantic" else None,
        size=size,
    )


def images() -> Tensor:
    batch = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    batch[1, :, 25:], batch[1, :, :, 50:] = 0, 0
    return batch


def tensors(value: Any) -> Iterator[Tensor]:
    """Walk through outputs: every tensor in a dataclass, list, tuple or dict."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def assert_equal(first: Any, second: Any) -> None:
    ours, theirs = list(tensors(first)), list(tensors(second))
    assert len(ours) == len(theirs) > 0
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right)


def assert_valid(name: str, found: list[Any], sizes: Tensor) -> None:
    """Predictions lie in the valid image, are sorted, and name classes that exist."""
    assert len(found) == len(sizes)
    for prediction, (height, width) in zip(found, sizes.tolist(), strict=True):
        if truth(name) == "semantic":
            assert prediction.size == (height, width)
            assert int(prediction.labels.max()) < 5
            continue
        assert isinstance(prediction, Detections)
        boxes, scores = prediction.boxes, prediction.scores
        assert (scores[:-1] >= scores[1:]).all()
        assert ((scores >= 0) & (scores <= 1)).all()
        assert (prediction.labels < 3).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()  # a box may end on the border, with no area left
        if truth(name) == "instances":
            assert prediction.masks is not None
            assert tuple(prediction.masks.shape) == (len(boxes), height, width)
        else:
            assert prediction.masks is None


def test_there_are_models() -> None:
    assert {"faster_rcnn", "fcos", "mask_rcnn", "retinanet", "unet"} <= set(NAMES)
    assert {name.removesuffix("_small") for name in SMALL} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_offers_the_contract(name: str) -> None:
    model = shared(name)
    assert isinstance(model, Segmenter if truth(name) == "semantic" else Detector)
    assert model.num_classes == (5 if truth(name) == "semantic" else 3)
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("name", "empty"),
    [(name, empty) for name in NAMES for empty in (False, True) if not (empty and name in HUGE)],
)
def test_losses_are_finite_and_every_parameter_receives_a_gradient(name: str, empty: bool) -> None:
    model, targets = shared(name), objects(name, empty=empty)
    model.zero_grad(set_to_none=True)
    terms = model.loss(model(images(), SIZES, targets), targets)
    values = {key: term.item() for key, term in terms.items()}
    assert all(term.ndim == 0 and math.isfinite(values[key]) for key, term in terms.items()), values
    assert all(key.startswith("loss_") for key in terms)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    sums = {key: gradient.sum() for key, gradient in gradients.items()}  # finite only where every summand is
    assert [key for key, total in sums.items() if not bool(total.isfinite())] == []
    placed = [value for key, value in values.items() if key.endswith(("box", "mask", "centerness"))]
    if empty and placed:  # nothing to place: no box, mask or centre can be wrong
        assert set(placed) == {0.0}, values
    elif not empty:
        assert all(value > 0 for value in values.values()), values
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_valid(name: str) -> None:
    if truth(name) == "semantic":
        assert tuple(logits_of(plain(name)).shape) == (2, 5, 32, 64)
    with torch.no_grad():
        assert_valid(name, shared(name).predict(plain(name), SIZES), SIZES)


@pytest.mark.parametrize("name", SMALL)
def test_truth_never_leaks_into_predictions(name: str) -> None:
    model = shared(name)
    with torch.no_grad():
        outputs = model(images(), SIZES, objects(name, empty=False))
        assert_equal(model.predict(outputs, SIZES), model.predict(plain(name), SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_do_not_depend_on_the_mode_apart_from_norm_and_dropout(name: str) -> None:
    model = shared(name).train()
    for module in model.modules():
        if any(kind in type(module).__name__ for kind in NORM_OR_DROPOUT):
            module.eval()
    with torch.no_grad():
        training = model(images(), SIZES)
    model.eval()
    assert_equal(plain(name), training)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name: str) -> None:
    other = build(name, seed=1).eval()
    other.load_state_dict(shared(name).state_dict(), strict=True)
    with torch.no_grad():
        assert_equal(plain(name), other(images(), SIZES))


@cache
def pair(kind: str) -> tuple[Tensor, list[Target]]:
    """Return two images of Orchard with three fruits or more each, as floats, and their truth."""
    dataset = OrchardDataset(split="train", images=40, image_size=128, truth=kind)
    chosen = [sample for sample in (dataset[index] for index in range(40)) if len(sample.target) >= 3][:2]
    return torch.stack([torch.as_tensor(sample.image) for sample in chosen]).float() / 255, [
        sample.target for sample in chosen
    ]


def made_before(model: Any, batch: Tensor, sizes: Tensor) -> dict[str, list[Tensor]]:
    """Return the proposals of a model that learns none: as in training they are made once, not in every step."""
    if getattr(model, "proposer", None) is None:
        return {}
    with torch.no_grad():
        return {"proposals": model(batch, sizes).given}


def figures(
    name: str, model: Any, batch: Tensor, sizes: Tensor, targets: list[Target], made: dict[str, list[Tensor]]
) -> dict[str, float]:
    """Return the figures that must reach 0.9 or what ``COARSE`` says, from one forward pass in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = model.predict(model(batch, sizes, **made), sizes)
    model.train()
    assert_valid(name, found, sizes)
    if truth(name) == "semantic":
        meter: Any = MeanIoU(num_classes=5)
        meter.update(found, targets)
        return {"miou": float(meter.compute()["miou"])}
    values = {}
    for kind in ("bbox", "segm") if truth(name) == "instances" else ("bbox",):
        meter = CocoAP(iou_type=kind)
        meter.update(found, targets)
        values[kind] = float(meter.compute()["map_50"])
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_images_are_learnt_by_heart(name: str) -> None:
    batch, targets = pair(truth(name))
    sizes = torch.tensor([[128, 128]] * 2)
    model = build(name).train()
    if isinstance(model, Localiser):  # one answer per image: there is one object to be found
        targets = [largest_object(target) for target in targets]
    made = made_before(model, batch, sizes)
    rate = 1e-2 if truth(name) == "semantic" else 1e-3  # a narrow U-Net with batch norm bears more, and starts slowly
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=rate)
    reached: dict[str, float] = {}
    wanted = COARSE.get(name, 0.9)
    for step in range(1, STEPS + 1):
        terms = model.loss(model(batch, sizes, targets, **made), targets)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if step % 40 == 0:
            reached = figures(name, model, batch, sizes, targets, made)
            if min(reached.values()) >= wanted:
                return
    raise AssertionError(f"{name} after {STEPS} steps on two images: {reached}, wanted {wanted}")
