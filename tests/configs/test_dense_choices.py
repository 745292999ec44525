"""The parts of a dense detector that a user may exchange by one argument, for every model that has them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from detseg.allow import CONFIG_RULES
from detseg.config import instantiate, load_config
from detseg.structures import Target
from shared import REPO

POINTS = ("points", "points_small", "atss_points", "task_aligned")
ASSIGNERS = {
    "retinanet_small": ("max_iou", "atss", "task_aligned"),
    "fcos_small": POINTS,
    "yolo_small": ("atss_points", "task_aligned"),
}
GROUPS = ("assigner", "classification_loss", "box_loss", "distribution_loss")
GRIDS = ("grid_cross_entropy", "grid_squared")
"""Losses of YOLOv2 and YOLOv3 alone, see ``test_box_losses``."""
FILES = {group: sorted(path.stem for path in (REPO / "conf" / group).glob("*.yaml")) for group in GROUPS}
DISTRIBUTIONS = {"retinanet_small": "deltas", "fcos_small": "distances", "yolo_small": "distances"}
CHOICES = [
    (model, group, choice)
    for model in ASSIGNERS
    for group in GROUPS
    for choice in (ASSIGNERS[model] if group == "assigner" else FILES[group])
    if choice not in GRIDS
    if group != "distribution_loss" or choice == DISTRIBUTIONS[model]
]


def build(name: str, *overrides: str) -> Any:
    cfg = load_config(f"model={name}", *overrides)
    cfg.data.num_classes = 3
    torch.manual_seed(0)
    return instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()


def targets() -> list[Target]:
    boxes = [torch.tensor([[4.0, 4, 30, 28], [36, 10, 54, 31]]), torch.zeros(0, 4)]
    return [Target(boxes=box, labels=torch.arange(len(box))) for box in boxes]


def test_every_file_of_the_groups_is_tried() -> None:
    tried = {(group, choice) for _, group, choice in CHOICES}
    assert tried == {(group, choice) for group in GROUPS for choice in FILES[group] if choice not in GRIDS}
    assert min(len(FILES[group]) for group in GROUPS) >= 2


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group in GROUPS for choice in FILES[group]])
def test_a_file_has_every_argument_of_its_class(group: str, choice: str) -> None:
    content = yaml.safe_load((REPO / "conf" / group / f"{choice}.yaml").read_text(encoding="utf-8"))
    if "defaults" in content:
        return
    module, _, name = content.pop("_target_").rpartition(".")
    assert any(module.startswith(prefix.rstrip(".")) for prefix in CONFIG_RULES)
    kind = getattr(__import__(module, fromlist=[name]), name)
    assert set(content) == {key for key in inspect.signature(kind).parameters if key not in ("args", "kwargs")}


@pytest.mark.parametrize(("name", "group", "choice"), CHOICES)
def test_a_detector_learns_and_predicts_with_it(name: str, group: str, choice: str) -> None:
    more = []
    if (name, choice) == ("fcos_small", "task_aligned"):  # its own distances start at 0, where no box meets an object
        more = ["distribution_loss@model.distribution_loss=distances"]
    model = build(name, f"{group}@model.{group}={choice}", *more)
    images, sizes = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64]] * 2)
    terms = model.loss(model(images), targets())
    values = {key: float(term.detach()) for key, term in terms.items()}
    assert all(math.isfinite(value) and value > 0 for value in values.values()), values
    torch.stack(list(terms.values())).sum().backward()
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    model.score_threshold = 0.0  # from random weights nothing is sure
    found = model.predict(model(images), sizes)
    assert all(0 < len(one) <= 100 and bool((one.scores.diff() <= 0).all()) for one in found)
    assert math.isfinite(sum(float(value) for value in model.diagnostics(model(images), targets()).values()))


@pytest.mark.parametrize("name", ASSIGNERS)
def test_a_factor_scales_its_term_and_an_unknown_one_is_refused(name: str) -> None:
    images = torch.rand(2, 3, 64, 64)
    plain, scaled = build(name), build(name, "model.loss_weights.box=30.0")
    ratio = 30.0 / (7.5 if name == "yolo_small" else 1.0)
    first, second = (model.loss(model(images), targets()) for model in (plain, scaled))
    assert float((second["loss_box"] / first["loss_box"]).detach()) == pytest.approx(ratio, rel=1e-5)
    assert float(second["loss_classification"].detach()) == float(first["loss_classification"].detach())
    cfg = OmegaConf.to_container(load_config(f"model={name}").model)
    cfg["loss_weights"] = {"boxes": 1.0}
    cfg["num_classes"] = 3
    with pytest.raises(Exception, match=r"loss_weights has \['boxes'\]; the terms of this model are"):
        instantiate(OmegaConf.to_container(OmegaConf.create(cfg), resolve=True), path="model")


@pytest.mark.parametrize("body", ["efficientnet_lite0_pan", "yolo_n"])
def test_yolo_takes_any_pyramid(body: str) -> None:
    pinned = ["model.backbone.backbone.weights=null"] if body != "yolo_n" else []
    model = build("yolo", f"backbone@model.backbone={body}", *pinned)
    assert model.backbone.channels == [64, 128, 256]
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64))
    assert outputs.logits.shape == (1, 64 + 16 + 4, 3) and outputs.regression.shape == (1, 84, 64)
