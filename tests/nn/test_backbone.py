from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from detseg.nn import CheckpointMismatch, TimmBackbone, TinyBackbone, TorchvisionBackbone
from shared import SHARED, needs_shared


def shapes(maps):
    return [tuple(level.shape[1:]) for level in maps]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (2, 4)])
def test_torchvision_resnet_equals_torchvision_layer_by_layer(strides):
    images = torch.rand(1, 3, 64, 96)
    backbone = TorchvisionBackbone(name="resnet18", strides=strides).eval()
    network = torchvision.models.resnet18(weights=None)
    own = backbone.state_dict()
    theirs = {key: value for key, value in network.state_dict().items() if key.split(".")[0] in backbone.layer_names}
    assert own.keys() == theirs.keys()
    network.load_state_dict(own, strict=False)
    layers = {2: "relu", 4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
    nodes = {layers[stride]: str(stride) for stride in strides}
    expected = torchvision.models._utils.IntermediateLayerGetter(network.eval(), nodes)(images)
    for ours, reference in zip(backbone(images), expected.values(), strict=True):
        assert_close(ours, reference)
    assert backbone.strides == list(strides)
    assert [level.shape[2] * stride for level, stride in zip(backbone(images), strides, strict=True)] == [64] * len(
        strides
    )


def test_torchvision_features_are_cut_where_the_resolution_halves():
    backbone = TorchvisionBackbone(name="mobilenet_v2").eval()
    assert backbone.channels == [24, 32, 96, 1280]
    assert shapes(backbone(torch.rand(1, 3, 64, 64))) == [(24, 16, 16), (32, 8, 8), (96, 4, 4), (1280, 2, 2)]
    assert "0.0.weight" in backbone.state_dict()  # torchvision's own names below ``features``


@pytest.mark.parametrize("name", [f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")])
def test_a_vgg_is_torchvisions_without_its_classifier(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None, init_weights=False).features
    body = TorchvisionBackbone(name=name, strides=(2, 4, 8, 16, 32))
    layers = [body.get_submodule(layer) for layer in body.layer_names]
    assert [repr(layer) for layer in layers] == [repr(layer) for layer in theirs]
    assert {key: value.shape for key, value in body.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # drawn by He's rule, as there
            spread = (2 / (layer.out_channels * 9)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.05) and not layer.bias.any()


def test_a_file_of_a_whole_vgg_fills_its_convolutions(tmp_path):
    features = TorchvisionBackbone(name="vgg11", strides=(32,))
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    state |= {f"classifier.{layer}.{part}": torch.zeros(1) for layer in (0, 3, 6) for part in ("weight", "bias")}
    torch.save(state, tmp_path / "vgg11.pth")
    body = TorchvisionBackbone(name="vgg11", weights=tmp_path / "vgg11.pth", strides=(8, 16))
    assert body.channels == [512, 512] and body.layer_names[-1] == "19"
    for key, value in body.state_dict().items():
        assert_close(value, state[f"features.{key}"], rtol=0, atol=0)


def test_unused_layers_are_left_out():
    assert not any(
        name.startswith("layer3") for name in TorchvisionBackbone(name="resnet18", strides=(4, 8)).state_dict()
    )
    trained = [
        name
        for name, value in TimmBackbone(name="mobilenetv3_small_050", strides=(4, 8)).named_parameters()
        if value.requires_grad
    ]
    backbone = TimmBackbone(name="mobilenetv3_small_050", strides=(4, 8))
    sum(level.sum() for level in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert [name for name, value in backbone.named_parameters() if value.grad is not None] == trained


@pytest.mark.parametrize("kind", [TorchvisionBackbone, TimmBackbone])
def test_a_stride_that_the_network_has_not_is_named(kind):
    with pytest.raises(ValueError, match=r"resnet18 has maps of strides \[.*16, 32\], not \[64\]"):
        kind(name="resnet18", strides=(32, 64))


def test_an_unknown_network_is_an_error_with_choices():
    with pytest.raises(ValueError, match=r"no network 'resnet19'.*resnet18"):
        TorchvisionBackbone(name="resnet19")


@pytest.mark.parametrize("kind", [TorchvisionBackbone, TimmBackbone])
@pytest.mark.parametrize(("stages", "first"), [(0, "conv1"), (1, "layer1"), (2, "layer2"), (3, "layer3")])
def test_frozen_stages_end_at_a_stride(kind, stages, first):
    backbone = kind(name="resnet18", frozen_stages=stages)
    trained = [name.removeprefix("net.") for name, value in backbone.named_parameters() if value.requires_grad]
    assert trained[0].split(".")[0] == first
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone.train()(torch.rand(2, 3, 64, 64))
    changed = {
        name.removeprefix("net.").split(".")[0]
        for name, value in backbone.named_buffers()
        if not torch.equal(value, before[name])
    }
    assert (
        changed
        == {"bn1", "layer1", "layer2", "layer3", "layer4"}
        - {0: set(), 1: {"bn1"}, 2: {"bn1", "layer1"}, 3: {"bn1", "layer1", "layer2"}}[stages]
    )


@pytest.mark.parametrize("kind", [TorchvisionBackbone, TimmBackbone])
def test_frozen_norm_leaves_no_batch_norm(kind):
    backbone = kind(name="resnet18", frozen_norm=True)
    kinds = [type(module) for module in backbone.modules()]
    assert nn.BatchNorm2d not in kinds
    assert sum(issubclass(kind, FrozenBatchNorm2d) for kind in kinds) == 20
    images = torch.rand(2, 3, 64, 64)
    for training, evaluating in zip(backbone.train()(images), backbone.eval()(images), strict=True):
        assert_close(training, evaluating, rtol=0, atol=0)


def test_v1_stride_moves_the_stride_to_the_first_convolution():
    backbone = TorchvisionBackbone(name="resnet50", v1_stride=True)
    block = backbone.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert shapes(backbone.eval()(torch.rand(1, 3, 64, 64)))[1] == (512, 8, 8)
    with pytest.raises(ValueError, match="not for resnet18"):
        TorchvisionBackbone(name="resnet18", v1_stride=True)


@pytest.mark.parametrize("kind", [TorchvisionBackbone, TimmBackbone])
def test_weights_from_a_path_half_precision_and_with_a_classifier(kind, tmp_path):
    network = torchvision.models.resnet18(weights=None)
    state = {key: value.half() if value.ndim > 1 else value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "body.pth")
    backbone = kind(name="resnet18", weights=tmp_path / "body.pth")
    own = {key.removeprefix("net."): value for key, value in backbone.state_dict().items()}
    assert own["layer4.1.conv2.weight"].dtype == torch.float32
    assert_close(own["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"].float(), rtol=0, atol=0)
    state["layer1.0.conv3.weight"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointMismatch, match=r"only in the model: layer1.0.conv1.weight; .*only in the file: layer1.0.conv3"
    ):
        kind(name="resnet18", weights=str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match=r"missing.pth"):
        kind(name="resnet18", weights=str(tmp_path / "missing.pth"))


def test_timm_names_joined_by_its_cut_are_loaded(tmp_path):
    import timm

    network = timm.create_model("convnext_atto", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "body.pth")
    backbone = TimmBackbone(name="convnext_atto", weights=tmp_path / "body.pth").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_intermediates(images, intermediates_only=True)[-4:]
        for ours, reference in zip(backbone(images), expected, strict=True):
            assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@needs_shared
def test_the_shared_efficientnet_is_loaded_with_its_own_mean():
    path = SHARED / "weights" / "tf_efficientnet_lite0_imagenet.pth"
    backbone = TimmBackbone(name="tf_efficientnet_lite0", weights=path, strides=(8, 16, 32))
    state = torch.load(path, weights_only=True)
    assert (backbone.mean, backbone.std) == ([0.5] * 3, [0.5] * 3)
    assert backbone.channels == [40, 112, 320]
    assert_close(backbone.net.conv_stem.weight, state["conv_stem.weight"].float(), rtol=0, atol=0)


def test_tiny_backbone_has_the_maps_it_promises():
    backbone = TinyBackbone(widths=(8, 16, 24), depth=2, stem=4, with_stem=True)
    assert (backbone.channels, backbone.strides) == ([4, 8, 16, 24], [2, 4, 8, 16])
    assert shapes(backbone(torch.rand(2, 3, 64, 32))) == [(4, 32, 16), (8, 16, 8), (16, 8, 4), (24, 4, 2)]
    assert TinyBackbone().channels == [32, 64, 128, 256]
    assert len(backbone.stages[0]) == 2


def test_a_network_of_timm_whose_first_map_is_left_out_has_the_strides_it_promises():
    backbone = TimmBackbone(
        name="dla34", strides=(4, 16)
    ).eval()  # timm counts its maps from stride 1, and lists from 2
    assert shapes(backbone(torch.rand(1, 3, 64, 64))) == [(64, 16, 16), (256, 4, 4)]
    assert backbone.channels == [64, 256]
