from __future__ import annotations

import pytest
import torch
import torchvision

from detseg.allow import ALLOWED_PREFIXES, RefusedTarget, check_target
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
        "",
        "detseg",
    ],
)
def test_other_packages_are_refused(path):
    with pytest.raises(RefusedTarget, match="must lie under"):
        check_target(path)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("torch.nn.modules.module.warnings.warn", "warnings"),
        ("torch.nn.modules.module.torch.load", "torch"),
        ("torch.nn.modules.module.OrderedDict", "collections"),
        ("detseg.stamp.run", "subprocess"),
        ("detseg.stamp.platform.os.system", "platform"),
        ("detseg.allow.importlib.import_module", "importlib"),
        ("detseg.nn.weights.torch.hub.load", "torch"),
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
    ],
)
def test_what_acts_instead_of_building_is_refused(path):
    with pytest.raises(RefusedTarget, match="and not under"):
        check_target(path)


@pytest.mark.parametrize(
    "path", ["torch.nn.Module.__init__", "torch.nn.ReLU.__class__", "detseg.models.__loader__.load"]
)
def test_inner_workings_are_refused(path):
    with pytest.raises(RefusedTarget, match="not a public name"):
        check_target(path)


def test_what_cannot_be_called_is_refused():
    for path in ("detseg.models", "detseg.allow.ALLOWED_PREFIXES", "torch.nn.functional"):
        with pytest.raises(RefusedTarget, match="not a class or a function"):
            check_target(path)


def test_a_name_that_does_not_exist_says_where_it_was_looked_for():
    with pytest.raises(ImportError, match=r"torch\.nn has no 'Rellu'"):
        check_target("torch.nn.Rellu")
    with pytest.raises(ImportError, match="has no 'FasterCNN'"):
        check_target("detseg.models.FasterCNN")


def test_the_user_may_allow_more():
    assert check_target("collections.Counter", [*ALLOWED_PREFIXES, "collections."]).__name__ == "Counter"
    with pytest.raises(RefusedTarget):
        check_target("collections._sys.exit", ["collections."])
