"""The parts of a segmenter that a user may exchange by one argument have every argument of their class."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from detseg.config import load_config
from detseg.models import available
from shared import REPO

WAYS = sorted(path.stem for path in (REPO / "conf" / "upsample").glob("*.yaml"))
GIVEN = {"channels", "width", "factor", "args", "kwargs"}
"""What the model gives to a layer that enlarges maps."""


@cache
def composed(name: str) -> dict[str, Any]:
    cfg = load_config(f"model={name}")
    return {"truth": cfg.truth, "model": OmegaConf.to_container(cfg.model)}


def target(section: dict[str, Any]) -> Any:
    module, _, name = section["_target_"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def test_there_are_all_ways_up() -> None:
    asked = "bed_of_nails bilinear max_unpooling nearest resize_convolution transposed transposed_bilinear"
    assert asked.split() == WAYS


@pytest.mark.parametrize("way", WAYS)
def test_a_way_up_has_every_argument_of_its_class(way: str) -> None:
    cfg = load_config("model=unet_small", f"upsample@model.upsample={way}")
    section: Any = OmegaConf.to_container(cfg.model.upsample)
    assert section.pop("_partial_") is True
    kind = target(section)
    assert set(section) - {"_target_"} == set(inspect.signature(kind).parameters) - GIVEN
    text = yaml.safe_load((REPO / "conf" / "upsample" / f"{way}.yaml").read_text(encoding="utf-8"))
    assert "_target_" in text or text["defaults"][0] in WAYS


@pytest.mark.parametrize("name", [card.name for card in available()])
def test_a_segmenter_has_every_argument_of_its_class(name: str) -> None:
    if composed(name)["truth"] != "semantic":
        return
    section = composed(name)["model"]
    assert set(section) - {"_target_"} == set(inspect.signature(target(section)).parameters)
