from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

import detseg
from detseg.data import DetectionData
from detseg.data.augment import Augment
from shared import REPO, needs_shared

FILES = sorted((REPO / "conf" / "data").glob("*.yaml"))
AUGMENTS = sorted((REPO / "conf" / "augment").glob("*.yaml"))
RECIPES = sorted((REPO / "conf" / "transform").glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_argument_is_a_key_and_every_key_an_argument(file: Path) -> None:
    keys = yaml.safe_load(file.read_text())
    arguments = set(inspect.signature(get_class(keys["_target_"])).parameters)
    recipes = {"train_transform", "eval_transform"}  # chosen by conf/transform
    assert set(keys) - {"_target_"} - recipes == arguments - recipes


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sources_have_every_key_and_build(file: Path) -> None:
    for keys in yaml.safe_load(file.read_text()).get("sources", []):
        source = get_class(keys["_target_"])
        assert set(keys) - {"_target_"} == set(inspect.signature(source).parameters)
        assert not instantiate(keys).ready(Path("nowhere"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipes_hold_their_defaults(file: Path) -> None:
    keys = yaml.safe_load(file.read_text())
    parameters = inspect.signature(get_class(keys.pop("_target_"))).parameters
    assert list(keys) == list(parameters)
    for name, value in keys.items():
        default = parameters[name].default
        assert value == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("file", AUGMENTS, ids=lambda file: file.stem)
def test_augmentations_have_every_argument_and_build(file: Path) -> None:
    cfg = detseg.load_config(f"augment={file.stem}", "truth=instances").data.train_transform
    parameters = inspect.signature(Augment).parameters
    assert set(cfg.augment) - {"_target_"} == set(parameters)
    if file.stem == "none":
        plain = OmegaConf.to_container(cfg.augment)
        for name, parameter in parameters.items():
            default = parameter.default
            assert plain[name] == (list(default) if isinstance(default, tuple) else default), name
    recipe = instantiate(cfg)
    assert (recipe.augment is None) == (file.stem == "none")


@needs_shared
@pytest.mark.parametrize(
    ("data", "model", "shape", "names"),
    [
        ("bccd", "fcos_small", (8, 3, 256, 320), ["RBC", "WBC", "Platelets"]),
        ("dsb2018", "mask_rcnn_small", (8, 3, 256, 256), ["nucleus"]),
        ("dsb2018", "unet_small", (8, 3, 256, 256), ["background", "nucleus"]),
        ("coco_ccby", "fcos_small", (8, 3, 320, 320), None),
    ],
)
def test_real_data_by_config(data: str, model: str, shape: tuple[int, ...], names: list[str] | None) -> None:
    cfg = detseg.load_config(f"data={data}", f"model={model}", "data.num_workers=0", "data.cache_images=false")
    module = instantiate(cfg.data)
    assert isinstance(module, DetectionData)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert tuple(batch.images.shape) == shape
    assert module.num_classes == 80 if names is None else module.class_names == names
    target = next(iter(module.val_dataloader())).targets[0]
    assert (target.masks is not None) == (module.truth == "instances")
    assert (target.semantic is not None) == (module.truth == "semantic")
