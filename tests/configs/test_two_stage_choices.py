"""The parts of a two-stage detector that a user may exchange by one argument, for every model that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from detseg.config import instantiate, load_config
from detseg.models import available
from detseg.structures import Target
from detseg.targets.samplers import HardSampler

PROPOSALS = [torch.tensor([[4.0, 4, 28, 30], [30, 8, 60, 60], [0, 0, 20, 20]])] * 2


def sections() -> dict[str, dict[str, Any]]:
    """Return the box section of every model that draws regions and learns boxes by gradients."""
    found = {}
    for card in available():
        model = OmegaConf.to_container(load_config(f"model={card.name}").model)
        if {"sampler", "class_agnostic"} <= set(model.get("box") or {}):
            found[card.name] = model["box"]
    return found


SECTIONS = sections()
SMALL = [name for name in SECTIONS if name.endswith("_small")]
POOLED = [name for name in SMALL if "levels" in SECTIONS[name]["pooling"]]


def build(name: str, *overrides: str) -> Any:
    cfg = load_config(f"model={name}", *overrides)
    cfg.data.num_classes = 3
    torch.manual_seed(0)
    return instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()


def batch() -> tuple[Tensor, Tensor, list[Target]]:
    boxes, size = torch.tensor([[5.0, 5, 30, 30], [30, 10, 60, 58]]), (64, 64)
    one = Target(boxes=boxes, labels=torch.tensor([0, 2]), masks=torch.ones(2, *size, dtype=torch.bool))
    none = Target(boxes=boxes[:0], labels=one.labels[:0], masks=torch.zeros(0, *size, dtype=torch.bool))
    return torch.rand(2, 3, *size), torch.tensor([size] * 2), [one, none]


def learn_and_predict(model: Any) -> Any:
    """Return the outputs of one batch, after a backward pass and a prediction."""
    images, sizes, targets = batch()
    given = None if model.proposer is None else PROPOSALS
    outputs = model(images, sizes, targets, given)
    sum(model.loss(outputs, targets).values()).backward()
    assert [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None] == []
    with torch.no_grad():
        assert len(model.predict(model(images, sizes, proposals=given), sizes)) == 2
    return outputs


def test_there_are_models() -> None:
    known = {"fast_rcnn", "faster_rcnn", "faster_rcnn_c4", "faster_rcnn_vgg16", "cascade_rcnn", "mask_rcnn"}
    assert known <= set(SECTIONS) and len(POOLED) >= 4


@pytest.mark.parametrize("name", SECTIONS)
def test_hard_examples_keep_the_models_number_of_regions(name: str) -> None:
    chosen = OmegaConf.to_container(load_config(f"model={name}", "sampler@model.box.sampler=hard").model.box.sampler)
    assert chosen["_target_"] == "detseg.targets.samplers.HardSampler"
    assert chosen["size"] == SECTIONS[name]["sampler"]["size"] and set(chosen) == {"_target_", "size", "threshold"}


@pytest.mark.parametrize("name", SMALL)
def test_hard_examples_and_one_box_for_all_classes_work_from_the_config(name: str) -> None:
    agnostic = ["model.box.class_agnostic=true"] if "class_agnostic" in SECTIONS[name] else []
    model = build(name, "sampler@model.box.sampler=hard", "model.box.sampler.size=5", *agnostic)
    outputs = learn_and_predict(model)
    branches = getattr(model.box, "stages", [model.box])
    assert all(isinstance(branch.sampler, HardSampler) for branch in branches)
    assert len(outputs.regions) == len(branches)
    for stage in outputs.regions:
        assert all(0 < len(labels) <= 5 for labels in stage.samples.labels)
        assert stage.class_logits.shape[1] == 4 and (not agnostic or stage.box_deltas.shape[1:] == (1, 4))


@pytest.mark.parametrize("kind", ["roi_align", "roi_pool"])
@pytest.mark.parametrize("name", POOLED)
def test_regions_may_be_pooled_or_aligned(name: str, kind: str) -> None:
    model = build(name, f"pooling@model.box.pooling={kind}")
    learn_and_predict(model)
    pooling = getattr(model.box, "stages", [model.box])[0].pooling
    assert type(pooling).__name__ == {"roi_align": "RegionAlign", "roi_pool": "RegionPool"}[kind]
    assert pooling.output_size == SECTIONS[name]["pooling"]["output_size"]
    assert pooling.levels == SECTIONS[name]["pooling"]["levels"]


def test_a_stage_of_the_cascade_may_be_left_out_or_ask_for_more() -> None:
    model = build("cascade_rcnn_small", "model.stages.third=null", "model.stages.second.matcher.positive=0.65")
    assert [branch.matcher.positive for branch in model.box.stages] == [0.5, 0.65]
    assert [branch.coder.weights[0] for branch in model.box.stages] == [10, 20]
    assert len(learn_and_predict(model).regions) == 2
    with pytest.raises(ValueError, match="set class_agnostic to true"):
        build("cascade_rcnn_small", "model.box.class_agnostic=false")
