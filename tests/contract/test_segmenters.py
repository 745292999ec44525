"""What every segmenter of ``conf/model`` stands: images of any size, and batches of which no pixel counts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from contract.test_models import CONF, SMALL, build, shared, truth
from detseg.config import instantiate, load_config
from detseg.models.segmenter import logits_of
from segmenter_cases import maps, target

NAMES = [name for name in SMALL if truth(name) == "semantic"]


@cache
def model(name: str) -> Any:
    return shared(name)


def test_there_are_segmenters() -> None:
    assert len(NAMES) >= 12
    assert {"unet_small", "fcn8s_small", "segnet_small", "smp_small"} <= set(NAMES)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (31, 33), (65, 17)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_works_in_training_too(name: str, size: tuple[int, int]) -> None:
    network, images = build(name).train(), torch.rand(2, 3, *size)
    sizes = torch.tensor([size, (max(size[0] - 1, 1), max(size[1] - 1, 1))])
    outputs = network(images, sizes)
    terms = network.loss(outputs, maps(size, tuple(sizes[1].tolist())))
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert logits_of(outputs).shape == (2, network.num_classes, *size)
    assert total.isfinite()
    assert all(value.grad.isfinite().all() for value in network.parameters() if value.grad is not None)
    found = network.predict(outputs, sizes)
    assert [one.size for one in found] == [tuple(row) for row in sizes.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_a_single_image_trains_or_says_why_not(name: str) -> None:
    network = build(name).train()
    try:
        outputs = network(torch.rand(1, 3, 33, 20))
    except ValueError as error:
        assert "batches of 2 images or more" in str(error)
        assert "\n" not in str(error)
        return
    assert logits_of(outputs).shape == (1, 5, 33, 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_pixel_that_counts_loses_nothing(name: str) -> None:
    network = build(name).train()
    nothing = [target(torch.full((32, 40), 255))] * 2
    terms = network.loss(network(torch.rand(2, 3, 32, 40)), nothing)
    assert {term.item() for term in terms.values()} == {0.0}
    torch.stack(list(terms.values())).sum().backward()
    for value in network.parameters():
        assert value.grad is None or float(value.grad.abs().max()) == 0.0


def upsamples(name: str) -> bool:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return any(
        isinstance(entry, dict) and any(key.startswith("/upsample@") for key in entry) for entry in content["defaults"]
    )


WAYS = sorted(path.stem for path in (CONF.parent / "upsample").glob("*.yaml"))
PLACES = [name for name in NAMES if upsamples(name.removesuffix("_small"))]
REFUSED = {"max_unpooling": ("fcn32s", "fcn16s", "fcn8s"), "transposed_bilinear": ("unet",)}
"""FCN pools nothing that its scores could undo; U-Net's up-convolution halves the channels."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PLACES)
def test_every_way_up_in_every_decoder_that_has_a_choice(name: str, way: str) -> None:
    cfg = load_config(f"model={name}", f"upsample@model.upsample={way}")
    cfg.data.num_classes = 5
    section = OmegaConf.to_container(cfg.model, resolve=True)
    if name.removesuffix("_small") in REFUSED.get(way, ()):
        with pytest.raises(Exception, match=r"unpooling needs switches|bilinear weights"):
            instantiate(section, path="model")(torch.rand(2, 3, 32, 40))
        return
    assert instantiate(section, path="model")(torch.rand(2, 3, 32, 40)).shape == (2, 5, 32, 40)
