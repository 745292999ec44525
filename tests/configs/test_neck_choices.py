"""Every detector that reads a pyramid takes every file of ``conf/neck``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from detseg.config import instantiate, load_config
from detseg.structures import Target
from shared import REPO

CONF = REPO / "conf"
NECKS = sorted(path.stem for path in (CONF / "neck").glob("*.yaml"))
SMALL = ("fcos_small", "retinanet_small", "faster_rcnn_small", "mask_rcnn_small", "cascade_rcnn_small")
LARGE = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn")


def section(name: str, neck: str) -> dict[str, Any]:
    """Return the model's section with this neck, for three classes and random weights."""
    cfg = load_config(f"model={name}", f"neck@model.backbone={neck}", "backbone@model.backbone.backbone=tiny")
    cfg.data.num_classes = 3
    return OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[return-value]  # it has string keys


@pytest.mark.parametrize("neck", NECKS)
def test_a_file_has_every_argument_of_its_class(neck: str) -> None:
    own = section("fcos", neck)["backbone"]
    module, _, kind = own.pop("_target_").rpartition(".")
    target = getattr(__import__(module, fromlist=[kind]), kind)
    assert set(own) == set(inspect.signature(target).parameters)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("neck", NECKS)
def test_the_papers_forms_keep_their_levels_and_width(name: str, neck: str) -> None:
    chosen, shipped = section(name, neck)["backbone"], section(name, "fpn")["backbone"]
    assert {key: chosen[key] for key in ("channels", "extra")} == {key: shipped[key] for key in ("channels", "extra")}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("neck", NECKS)
def test_small_detectors_learn_over_it(name: str, neck: str) -> None:
    torch.manual_seed(0)
    model = instantiate(section(name, neck), path="model").train()
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, 8:40, 4:40] = True
    truth = Target(boxes=torch.tensor([[4.0, 8, 40, 40]]), labels=torch.tensor([1]), masks=masks)
    images, sizes, targets = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [64, 64]]), [truth, truth]
    terms = model.loss(model(images, sizes, targets), targets)
    torch.stack(list(terms.values())).sum().backward()
    reached = [value.grad is not None for name, value in model.backbone.named_parameters() if "body" not in name]
    assert reached and all(reached)
