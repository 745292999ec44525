"""Inference of dense detectors on one image: ours beside torchvision's, and what layout and precision gain.

torchvision's weights cannot be had offline, and random ones find nothing or everything. So the last layers are scaled
until their outputs spread as those of a trained detector do, and the classes (or the background) are shifted until as
many candidates pass the threshold as asked for: then suppression has something to do.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from history_two_stage import untrained
from side_by_side.turns import paired_ratio, seconds_in_turns
from side_by_side.twins import SIDES, twins
from torch import Tensor, nn

import detseg
from detseg.config import load_config

PIXELS = 320
NEEDED = {"yolo_v1": 448, "cornernet": 384, "ssd300": 300, "ssd512": 512}
"""Pixels of models that take no image of 320: layers of a fixed size, or strides up to 128."""
CANDIDATES = 1000


class Pair(NamedTuple):
    """Both models on the same image.

    Attributes:
        name: of the model.
        pixels: side of the image.
        seconds: of theirs, ours, theirs and ours with the channels last, round by round.
        found: detections of theirs.
        apart: largest difference of boxes in pixels; infinite where detections or labels differ.
    """

    name: str
    pixels: int
    seconds: list[list[float]]
    found: int
    apart: float

    def cells(self) -> list[str]:
        """Return the row of a table."""
        theirs, ours, their_last, our_last = self.seconds
        rates = [f"{1 / statistics.median(times):.2f}" for times in self.seconds]
        best = min((theirs, their_last), key=statistics.median)
        ratios = [paired_ratio(theirs, ours), paired_ratio(theirs, our_last), paired_ratio(best, our_last)]
        equal = f"yes, {self.apart:.0e} px" if self.apart < 0.1 else "NO"
        return [self.name, str(self.pixels), *rates, *(f"{ratio:.2f}x" for ratio in ratios), str(self.found), equal]


PAIR_HEAD = (
    "model",
    "pixels",
    "torchvision",
    "detseg",
    "torchvision, channels last",
    "detseg, channels last",
    "plain / plain",
    "channels last / plain",
    "channels last / their better",
    "detections",
    "equal",
)


@torch.no_grad()
def compare(name: str, rounds: int) -> Pair:
    """Time torchvision's model and ours on one image, and compare what they find."""
    pixels = SIDES.get(name, PIXELS)
    image = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))  # (1, 3, H, W)
    torch.manual_seed(1)
    theirs, ours = (model.eval() for model in twins(name, partial(enliven, image=image)))
    shift_candidates(theirs, ours, image)
    last = [twin.eval().to(memory_format=torch.channels_last) for twin in twins(name)]
    for model, twin in zip((theirs, ours), last, strict=True):
        twin.load_state_dict(model.state_dict())
    calls = [
        partial(theirs, [image[0]]),
        partial(find, ours, image),
        partial(last[0], [image[0]]),
        partial(find, last[1], image.contiguous(memory_format=torch.channels_last)),
    ]
    wanted, found = theirs([image[0]])[0], find(ours, image)[0]
    one_off = 1  # torchvision counts its classes from 1
    return Pair(name, pixels, seconds_in_turns(calls, rounds), len(wanted["labels"]), apart(found, wanted, one_off))


def find(model: Any, images: Tensor) -> Any:
    """Return our model's detections."""
    sizes = torch.tensor([images.shape[2:]] * len(images))  # (B, 2)
    return model.predict(model(images, sizes), sizes)


def apart(found: Any, wanted: dict[str, Tensor], one_off: int) -> float:
    """Return the largest difference of the boxes, in pixels; infinite where they differ in number or label."""
    if len(found) != len(wanted["labels"]):
        return float("inf")
    ours, theirs = found.scores.argsort(descending=True), wanted["scores"].argsort(descending=True)
    if not torch.equal(found.labels[ours], wanted["labels"][theirs] - one_off):
        return float("inf")
    return float((found.boxes[ours] - wanted["boxes"][theirs]).abs().max()) if len(found) else 0.0


@torch.no_grad()
def enliven(theirs: Any, image: Tensor) -> None:
    """Make a random model of torchvision's say something about an image: logits and deltas spread on every level."""
    theirs.eval()
    pictures = [image[0], image[0].flip(2)]  # two, for a norm cannot learn from a single cell
    batch = theirs.transform(pictures)[0].tensors  # (2, 3, H, W)
    norms = [(module, module.momentum) for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, _ in norms:  # their statistics become those of this image
        norm.train().momentum = 1.0
    if norms:
        theirs.head(list(theirs.backbone(batch).values()))
    for norm, momentum in norms:
        norm.eval().momentum = momentum
    levels = list(theirs.backbone(batch).values())
    for spread, part in ((1.5, theirs.head.classification_head), (0.3, theirs.head.regression_head)):
        for tower, layer, inputs in _last_layers(part, levels):
            values = torch.cat([layer(tower(level)).flatten() for level in inputs])
            layer.weight *= spread / float(values.std())
    for name, parameter in theirs.named_parameters():
        if name.endswith("bbox_reg.bias"):
            parameter.fill_(0.5)  # FCOS's distances pass a ReLU: most shall live


def _last_layers(part: Any, levels: list[Tensor]) -> Iterator[tuple[Callable[[Tensor], Tensor], Any, list[Tensor]]]:
    """Yield what comes before each layer that predicts classes or boxes, the layer, and the levels that it reads."""
    if hasattr(part, "module_list"):  # SSD: a predictor for each level
        for index, predictor in enumerate(part.module_list):
            alone = isinstance(predictor, nn.Conv2d)
            own = levels[index : index + 1]
            yield (nn.Identity() if alone else predictor[:-1]), predictor if alone else predictor[-1], own
    else:
        yield part.conv, part.cls_logits if hasattr(part, "cls_logits") else part.bbox_reg, levels


@torch.no_grad()
def shift_candidates(theirs: Any, ours: Any, image: Tensor) -> None:
    """Shift the classes of both models, or in SSD their background, until ``CANDIDATES`` pass the threshold."""
    outputs = ours(image)
    softmax = outputs.logits.shape[2] > ours.num_classes
    low, high = -30.0, 30.0
    for _ in range(24):  # bisection: fewer pass the larger the offset
        offset = (low + high) / 2
        low, high = (
            (offset, high) if _passing(outputs, ours.score_threshold, offset, softmax) > CANDIDATES else (low, offset)
        )
    for model, outputs_per_anchor in ((theirs, ours.num_classes + 1), (ours, ours.num_classes + int(softmax))):
        for layer in _class_layers(model):
            bias = layer.bias.view(-1, outputs_per_anchor)  # (A, K) or (A, K + 1)
            bias[:, 0 if softmax else slice(None)] += offset if softmax else -offset
            if not softmax and outputs_per_anchor > ours.num_classes:
                bias[:, 0] = -100.0  # a class that torchvision counts and never uses


def _passing(outputs: Any, threshold: float, offset: float, softmax: bool) -> int:
    if softmax:
        logits = outputs.logits.clone()  # (B, N, K + 1)
        logits[..., 0] += offset
        return int((logits.softmax(2)[..., 1:] > threshold).sum())
    score = (outputs.logits - offset).sigmoid()  # (B, N, K)
    if outputs.quality is not None:
        score = (score * outputs.quality.sigmoid()[..., None]).sqrt()
    return int((score > threshold).sum())


def _class_layers(model: Any) -> list[Any]:
    return [layer for _, layer, _ in _last_layers(model.head.classification_head, [])]


def dense_models() -> list[str]:
    """Return the one-stage and anchor-free models in their papers' form, oldest first."""
    names = [card.name for card in detseg.models.available() if not card.name.endswith("_small")]
    families = ("OneStageDetection", "AnchorFreeDetection")
    return [name for name in names if load_config(f"model={name}").task["_target_"].endswith(families)]


GAIN_HEAD = (
    "model",
    "pixels",
    "float32, images/s",
    "channels last",
    "channels last, bf16-mixed",
    "channels last, bf16-true",
)


@torch.no_grad()
def gains(name: str, rounds: int) -> list[str]:
    """Return a row: images per second of a network alone, from random weights, and how much faster it is otherwise."""
    pixels = NEEDED.get(name, PIXELS)
    torch.manual_seed(0)
    model, image = untrained(name), torch.rand(1, 3, pixels, pixels)  # (1, 3, H, W)
    last = image.contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    short = copy.deepcopy(twin).bfloat16()
    calls = [partial(model, image), partial(twin, last), partial(_mixed, twin, last), partial(short, last.bfloat16())]
    times = seconds_in_turns(calls, rounds)
    medians = [statistics.median(own) for own in times]
    return [name, str(pixels), f"{1 / medians[0]:.2f}", *(f"{medians[0] / own:.2f}x" for own in medians[1:])]


def _mixed(model: nn.Module, images: Tensor) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return model(images)
