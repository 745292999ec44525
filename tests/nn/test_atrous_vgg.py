from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.vgg import cfgs, make_layers

from detseg.nn import AtrousVGG16, CheckpointMismatch


def test_maps_are_those_of_the_paper() -> None:
    body = AtrousVGG16().eval()
    assert body.channels == [512, 1024] and body.strides == [8, 16]
    with torch.no_grad():
        fine, coarse = body(torch.rand(1, 3, 76, 44))
    assert tuple(fine.shape) == (1, 512, 10, 6) and tuple(coarse.shape) == (1, 1024, 5, 3)  # pool3 rounds up


def test_a_file_of_vgg16_fills_the_layers_up_to_conv5_3(tmp_path: Path) -> None:
    torch.manual_seed(1)
    features = make_layers(cfgs["D"]).eval()
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, tmp_path / "vgg.pth")
    body = AtrousVGG16(weights=tmp_path / "vgg.pth").eval()
    images = torch.rand(1, 3, 64, 32)  # of a size that pool3 need not round
    with torch.no_grad():
        conv4, conv5 = features[:23](images), features[:30](images)
        fine, coarse = body(images)
    assert_close(fine, conv4, rtol=1e-4, atol=1e-6)
    assert_close(coarse, body.fc(conv5), rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointMismatch, match=r"features\.0\.weight"):
        torch.save({"features.0.bias": torch.zeros(64)}, tmp_path / "part.pth")
        AtrousVGG16(weights=tmp_path / "part.pth")


def test_frozen_stages_hold_the_first_blocks() -> None:
    body = AtrousVGG16(frozen_stages=1)
    held = [name for name, value in body.named_parameters() if not value.requires_grad]
    assert held == [f"{layer}.{part}" for layer in (0, 2, 5, 7) for part in ("weight", "bias")]  # conv1 and conv2


def test_fc6_and_fc7_are_thinned_out_as_the_paper_says() -> None:
    row, column = torch.arange(4096.0), torch.arange(512.0 * 49)
    body = AtrousVGG16()

    def start(six: Tensor, seven: Tensor) -> None:
        names = ("classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias")
        body.thin_out(dict(zip(names, (six, row, seven, row + 1), strict=True)))

    start(row[:, None].expand(4096, 512 * 49), row[:, None].expand(4096, 4096))  # views: a real one takes 411 MB
    six, seven = body.fc[1], body.fc[3]
    assert_close(six.weight, (4 * torch.arange(1024.0))[:, None, None, None].expand(1024, 512, 3, 3))
    assert_close(seven.weight[:, 0, 0, 0], 4 * torch.arange(1024.0))
    assert_close(six.bias, 4 * torch.arange(1024.0))
    assert_close(seven.bias, 4 * torch.arange(1024.0) + 1)
    start(column.expand(4096, 512 * 49), row.expand(4096, 4096))
    wanted = torch.tensor([[0.0, 3, 6], [21, 24, 27], [42, 45, 48]])  # every third row and column of 7 x 7
    assert_close(six.weight[5, 0], wanted)
    assert_close(six.weight[1023, 511], wanted + 511 * 49)
    assert_close(seven.weight[7, :, 0, 0], 4 * torch.arange(1024.0))
    start((column * torch.nan).expand(4096, 512 * 49), row.expand(4096, 4096))  # the classifier of IMAGENET1K_FEATURES
    assert_close(six.weight[5, 0], wanted)
