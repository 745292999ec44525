from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from detseg.models import FasterRCNN
from detseg.models.box_branch import BoxBranch
from detseg.models.conv_head import ConvHead, ResidualHead
from detseg.models.region_features import RegionAlign
from detseg.models.rpn import RegionProposalNetwork
from detseg.nn import TorchvisionBackbone
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator


@pytest.mark.parametrize("name, channels", [("resnet18", 256), ("resnet50", 1024)])
@torch.no_grad()
def test_the_head_and_the_backbone_are_one_resnet_cut_in_two(name: str, channels: int, tmp_path: Path) -> None:
    network = torchvision.models.get_model(name, weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    path = tmp_path / "resnet.pth"
    torch.save(network.state_dict(), path)
    body = TorchvisionBackbone(name=name, weights=path, strides=[16]).eval()
    head = ResidualHead(shape=(channels, 14, 14), name=name, weights=path)
    image = torch.rand(2, 3, 64, 96)
    (features,) = body(image)
    assert features.shape == (2, channels, 4, 6) and head.out_features == network.fc.in_features
    assert_close(network.fc(head(features)), network(image))
    assert not hasattr(body, "layer4") and {key.split(".")[0] for key in head.state_dict()} == {"layer4"}
    assert all(not isinstance(module, nn.BatchNorm2d) for module in head.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in head.modules())


def test_no_region_at_all_and_norms_that_learn() -> None:
    head = ResidualHead(shape=(256, 14, 14), name="resnet18", frozen_norm=False)
    assert any(isinstance(module, nn.BatchNorm2d) for module in head.modules())
    assert head.eval()(torch.rand(3, 256, 14, 14)).shape == (3, 512)
    assert head(torch.rand(0, 256, 14, 14)).shape == (0, 512)
    small = ConvHead(shape=(4, 7, 7), widths=[6, 5])
    assert small(torch.rand(0, 4, 7, 7)).shape == (0, 5)


def test_the_stride_may_be_that_of_the_first_resnet() -> None:
    head = ResidualHead(shape=(1024, 14, 14), v1_stride=True)
    assert head.layer4[0].conv1.stride == (2, 2) and head.layer4[0].conv2.stride == (1, 1)
    assert ResidualHead(shape=(1024, 14, 14)).layer4[0].conv2.stride == (2, 2)


def test_what_does_not_fit_is_said_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="layer4 of resnet50 takes 1024 channels, but regions have 256"):
        ResidualHead(shape=(256, 14, 14))
    with pytest.raises(ValueError, match="vgg11 has no layer4; choose a ResNet"):
        ResidualHead(shape=(512, 7, 7), name="vgg11")
    with pytest.raises(ValueError, match="widths is empty"):
        ConvHead(shape=(4, 7, 7), widths=[])


@torch.no_grad()
def test_the_small_head_by_hand() -> None:
    head = ConvHead(shape=(1, 4, 4), widths=[1, 1], stride=2)
    for (convolution, _), bias in zip(head.convs, (0.5, -1.0), strict=True):
        convolution.weight.zero_()
        convolution.weight[0, 0, 1, 1] = 2.0  # only the cell itself counts
        convolution.bias.fill_(bias)
    region = torch.arange(16.0).reshape(1, 1, 4, 4)
    # every second cell of every second row: 0, 2, 8, 10 -> 0.5, 4.5, 16.5, 20.5 -> 0, 8, 32, 40
    assert_close(head(region), torch.tensor([[20.0]]))


def test_a_single_map_detector_learns_everywhere() -> None:
    body = TorchvisionBackbone(name="resnet18", strides=[16], frozen_norm=True)
    anchors = AnchorGenerator(sizes=[[32, 64]], ratios=[[0.5, 1.0, 2.0]])
    box = partial(
        BoxBranch,
        pooling=RegionAlign(output_size=14, levels=1),
        head=partial(ResidualHead, name="resnet18"),
    )
    model = FasterRCNN(
        num_classes=3, backbone=body, rpn=partial(RegionProposalNetwork, anchors=anchors, width=24), box=box
    )
    assert model.rpn.head.conv[0][0].weight.shape == (24, 256, 3, 3)
    assert model.strides == [16] and model.box.predictor.cls_score.in_features == 512
    targets = [Target(boxes=torch.tensor([[8.0, 8, 50, 60]]), labels=torch.tensor([2]))]
    images = torch.rand(1, 3, 64, 96)
    losses = model.loss(model(images, targets=targets), targets)
    assert all(value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None] == []


@torch.no_grad()
def test_vgg16_at_stride_16_is_conv5_3() -> None:
    body = TorchvisionBackbone(name="vgg16", strides=[16]).eval()
    assert body.layer_names[-1] == "29" and body.channels == [512] and body.strides == [16]
    image = torch.rand(1, 3, 64, 96)
    (features,) = body(image)
    expected = image
    for layer in body.layer_names:
        expected = body.get_submodule(layer)(expected)
    assert_close(features, expected)
    assert features.shape == (1, 512, 4, 6) and (features >= 0).all()  # after its ReLU, before the last pooling
    convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 13
