"""Every way of suppressing boxes in every detector, by one override; a model's own threshold goes with each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from detseg.config import instantiate, load_config
from detseg.models import available
from detseg.ops.adaptive_nms import DensityAdaptiveNMS, SizeAdaptiveNMS
from detseg.ops.nms import BatchedNMS
from detseg.ops.soft_nms import SoftNMS
from shared import REPO

CHOICES = {
    "greedy": BatchedNMS,
    "soft_linear": SoftNMS,
    "soft_gaussian": SoftNMS,
    "adaptive_size": SizeAdaptiveNMS,
    "adaptive_density": DensityAdaptiveNMS,
}
PROPOSALS = [torch.tensor([[4.0, 4, 28, 30], [30, 8, 60, 60], [0, 0, 20, 20], [3, 3, 28, 31]])]


@cache
def composed(name: str) -> dict[str, Any]:
    """Return the model's section of the config as it ships."""
    return OmegaConf.to_container(load_config(f"model={name}").model)  # type: ignore[return-value]


def places(node: dict[str, Any], path: str = "model") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the content of every suppression in a config."""
    for key, value in node.items():
        if isinstance(value, dict):
            if key == "nms":
                yield f"{path}.{key}", value
            yield from places(value, f"{path}.{key}")


def suppresses(name: str) -> bool:
    """Say whether a model takes the group, by its own list of defaults or that of a file that it inherits from."""
    content = yaml.safe_load((REPO / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    entries = content.get("defaults", [])
    chosen = any(key.startswith("/nms@") for entry in entries if isinstance(entry, dict) for key in entry)
    return chosen or any(suppresses(entry) for entry in entries if isinstance(entry, str) and entry != "_self_")


MODELS = [card.name for card in available() if suppresses(card.name)]
SMALL = [name for name in MODELS if name.endswith("_small")]
LARGE = [name for name in MODELS if name not in SMALL]


def test_the_group_is_what_is_tested_here() -> None:
    assert {path.stem for path in (REPO / "conf" / "nms").glob("*.yaml")} == set(CHOICES)
    assert {"faster_rcnn", "mask_rcnn", "retinanet", "fcos"} <= set(MODELS) and len(SMALL) >= 4


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_has_every_argument_and_a_threshold_with_the_classes_own_defaults(choice: str) -> None:
    content = yaml.safe_load((REPO / "conf" / "nms" / f"{choice}.yaml").read_text(encoding="utf-8"))
    kind = CHOICES[choice]
    assert content.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
    arguments = inspect.signature(kind).parameters
    assert set(content) == set(arguments) and "threshold" in content
    given = {name: one.default for name, one in arguments.items() if one.default is not inspect.Parameter.empty}
    given.pop("method", None)
    assert {name: content[name] for name in given} == given


def with_choice(name: str, choice: str) -> Any:
    """Return the config of a model with every suppression exchanged, each built once and compared."""
    keys = dict(places(composed(name)))
    cfg = load_config(f"model={name}", *(f"nms@{key}={choice}" for key in keys))
    for key, shipped in keys.items():
        nms = instantiate(OmegaConf.select(cfg, key), path=key)
        assert type(nms) is CHOICES[choice] and nms.threshold == shipped["threshold"]
        assert getattr(nms, "method", choice[5:]) == choice[5:]
    return cfg


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", LARGE)
def test_every_model_takes_every_choice_and_keeps_its_threshold(name: str, choice: str) -> None:
    assert with_choice(name, choice).model._target_ == composed(name)["_target_"]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", SMALL)
def test_small_models_predict_with_it(name: str, choice: str) -> None:
    cfg = with_choice(name, choice)
    cfg.data.num_classes = 3
    torch.manual_seed(0)
    model = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()
    for part in (model, getattr(model, "box", None)):
        if part is not None and hasattr(part, "score_threshold"):
            part.score_threshold = 0.0  # from random weights nothing is sure
    sizes = torch.tensor([[64, 64]])
    with torch.no_grad():
        given = {} if getattr(model, "proposer", None) is None else {"proposals": PROPOSALS}
        found = model.predict(model(torch.rand(1, 3, 64, 64), sizes, **given), sizes)[0]
    assert len(found) > 0 and (found.scores.diff() <= 0).all()


def test_a_choice_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"there is no nms=softer.*greedy, soft_gaussian, soft_linear"):
        load_config("model=fcos", "nms@model.nms=softer")
