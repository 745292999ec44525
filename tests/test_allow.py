from __future__ import annotations

import sys

import pytest
import torch
import torchvision

from detseg.allow import CONFIG_RULES, RefusedTarget, build_plain, check_target, dependency_modules, rules_for
from detseg.data import DetectionEval
from detseg.models import UNet


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("torch.nn.ReLU", torch.nn.ReLU),
        ("torch.nn.functional.relu", torch.nn.functional.relu),
        ("torchvision.ops.MLP", torchvision.ops.MLP),
        ("torchvision.models.resnet.resnet18", torchvision.models.resnet18),
        ("detseg.models.UNet", UNet),
        ("detseg.models.unet.UNet", UNet),
        ("detseg.data.DetectionEval", DetectionEval),
    ],
)
def test_parts_of_models_are_found(path, expected):
    assert check_target(path) is expected


@pytest.mark.parametrize("path", ["timm.create_model", "segmentation_models_pytorch.Unet"])
def test_libraries_that_models_come_from(path):
    assert check_target(path).__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torchvisions.ops.MLP",
        "torch.nnx.ReLU",
        "detsegment.x",
        "detseg",
        "lightning.Trainer",
        "torch.optim.SGD",
        "torch.utils.cpp_extension.load",
        "sympy.sympify",
    ],
)
def test_other_packages_are_refused(path):
    with pytest.raises(RefusedTarget, match="it is not among what a config or checkpoint may call"):
        check_target(path)


@pytest.mark.parametrize(
    "path", ["", ".", "torch.nn.", "torch.nn..ReLU", "torch.nn.ReLU()", "os:system", None, 3, ["x"]]
)
def test_what_is_no_dotted_path_is_refused(path):
    with pytest.raises(RefusedTarget, match="no dotted path"):
        check_target(path)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("torch.nn.modules.module.warnings.warn", "warnings"),
        ("torch.nn.modules.module.torch.load", "torch"),
        ("torch.nn.modules.module.OrderedDict", "collections"),
        ("detseg.data.cache.contextlib.suppress", "contextlib"),
        ("detseg.data.cache.os.system", "os"),
        ("detseg.models.lazy_names", "detseg.lazy"),
        ("detseg.nn.backbone.torch.hub.load", "torch"),
        ("detseg.structures.detections.dataclass", "dataclasses"),
    ],
)
def test_what_was_merely_imported_there_is_refused(path, where):
    """The path begins well, the object lies elsewhere."""
    with pytest.raises(RefusedTarget, match=rf"the module {where}"):
        check_target(path)


@pytest.mark.parametrize(
    "path",
    [
        "detseg.cli.main.main",
        "detseg.config.build",
        "detseg.checkpoint.load",
        "torchvision.datasets.utils.download_url",
        "torchvision.io.write_file",
        "torchvision.utils.save_image",
        "timm.models.load_checkpoint",
        "timm.models.load_state_dict_from_hf",
        "timm.utils.CheckpointSaver",
        "timm.data.create_dataset",
        "detseg.experiment.train",
        "detseg.experiment.write_json",
        "detseg.results.write_map",
        "detseg.visualize.save",
        "detseg.draw",
        "detseg.build",
        "detseg.durable.write_sealed",
        "detseg.data.cache.save",
        "detseg.data.parcel.Parcel",
        "detseg.data.files.find",
        "detseg.nn.load_weights",
        "detseg.nn.weights.read_plain",
        "detseg.models.torchvision_weights.load_published",
        "detseg.callbacks.images.ImageLogger.on_validation_epoch_end",
        "detseg.callbacks.overlays.send",
        "segmentation_models_pytorch.from_pretrained",
        "segmentation_models_pytorch.datasets.OxfordPetDataset",
        "lightning.LightningModule.load_from_checkpoint",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.fabric.utilities.cloud_io.get_filesystem",
        "torch.optim.swa_utils.update_bn",
    ],
)
def test_what_acts_instead_of_building_is_refused(path):
    with pytest.raises((RefusedTarget, ImportError)):
        check_target(path, CONFIG_RULES)


@pytest.mark.parametrize(
    "path",
    [
        "lightning.Trainer",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.StepLR",
        "detseg.callbacks.progress_bar",
        "detseg.callbacks.images.ImageLogger",
    ],
)
def test_what_surrounds_training_is_for_configs_alone(path):
    assert check_target(path, CONFIG_RULES).__name__ == path.rpartition(".")[2]
    with pytest.raises(RefusedTarget):
        check_target(path)


@pytest.mark.parametrize(
    "path", ["segmentation_models_pytorch.Unet.from_pretrained", "torch.nn.Embedding.from_pretrained"]
)
def test_methods_are_refused(path):
    with pytest.raises(RefusedTarget, match=r"'from_pretrained' is an attribute of .*, not of a module"):
        check_target(path)


@pytest.mark.parametrize(
    "path",
    [
        "torch.nn.Module.__init__",
        "torch.nn.ReLU.__class__",
        "detseg.models.__loader__.load",
        "timm.models._helpers.load_checkpoint",
        "detseg.data.parcel._Reader",
    ],
)
def test_inner_workings_are_refused(path):
    with pytest.raises(RefusedTarget, match="not a public name"):
        check_target(path)


def test_what_cannot_be_called_is_refused():
    for path in ("detseg.models.unet", "detseg.tasks.schedules", "torch.nn.functional"):
        with pytest.raises(RefusedTarget, match="not a class or a function"):
            check_target(path)


def test_a_name_that_does_not_exist_says_where_it_was_looked_for():
    with pytest.raises(ImportError, match=r"torch\.nn has no 'Rellu'"):
        check_target("torch.nn.Rellu")
    with pytest.raises(ImportError, match="has no 'FasterCNN'"):
        check_target("detseg.models.FasterCNN")


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package of the user's, on the path."""
    text = """
import os

class Net:
    @classmethod
    def small(cls):
        return "small"

def make():
    return "made"
"""
    (tmp_path / "ownparts.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "ownparts"
    sys.modules.pop("ownparts", None)


def test_the_user_may_allow_a_package_of_their_own(own_package):
    rules = rules_for([own_package])
    assert check_target("ownparts.make", rules)() == "made" and check_target("ownparts.Net.small", rules)() == "small"
    assert check_target("torch.nn.ReLU", rules) is torch.nn.ReLU
    with pytest.raises(RefusedTarget, match="allow="):
        check_target("ownparts.make")
    with pytest.raises(RefusedTarget, match="the module os"):
        check_target("ownparts.os.system", rules)


@pytest.mark.parametrize(
    "name", ["os", "builtins", "subprocess", "detseg", "detseg.stamp", "torch", "torch.hub", "numpy", "pandas", "sympy"]
)
def test_what_can_run_anything_cannot_be_allowed(name):
    with pytest.raises(RefusedTarget, match=f"allow: {name} belongs to"):
        rules_for([name])


@pytest.mark.parametrize("name", ["", ".", "*", "a b", "_private", "mypackage..x", "o*", None])
def test_a_name_to_allow_is_a_name(name):
    with pytest.raises(RefusedTarget, match="no package's name"):
        rules_for([name])


def test_dependencies_are_all_the_way_down():
    assert {"torch", "sympy", "pandas", "yaml", "PIL", "cv2", "hydra", "omegaconf"} <= dependency_modules()
    assert "tests" not in dependency_modules()


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "x.pth"},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "x.pth"}},
        {"_args_": ["resnet18", True, {"file": "x.pth"}]},
        {"model_name": "hf-hub:somebody/net"},
        {"model_name": "HF_hub:somebody/net"},
        {"_args_": ["local-dir:/tmp/x"]},
    ],
)
def test_arguments_that_read_pickles_are_refused(arguments):
    with pytest.raises(RefusedTarget, match="is refused with"):
        build_plain({"_target_": "timm.create_model", **({"model_name": "resnet18"} | arguments)})


def test_ordinary_arguments_pass():
    net = build_plain({"_target_": "timm.create_model", "_args_": ["resnet18"], "pretrained": False, "num_classes": 3})
    assert net.num_classes == 3
    with pytest.raises(RefusedTarget, match="hf-hub"):
        build_plain({"_target_": "detseg.nn.TimmBackbone", "name": "hf-hub:a/b"})
