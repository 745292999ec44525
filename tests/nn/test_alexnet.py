from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close

from detseg.models import FCN
from detseg.nn import AlexNetEncoder


@pytest.fixture(scope="module")
def theirs() -> torchvision.models.AlexNet:
    return torchvision.models.alexnet(weights=None).eval()


@pytest.fixture(scope="module")
def file(theirs: torchvision.models.AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(theirs.state_dict(), path)
    return path


def test_every_layer_is_torchvisions_but_for_its_padding(theirs: torchvision.models.AlexNet, file: Path):
    """Away from the borders the maps agree, once their convolution sees the image where ours does."""
    ours = AlexNetEncoder(weights=file).eval()
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        found = ours(images)
        assert [level.shape[1:] for level in found] == [(64, 32, 32), (192, 16, 16), (4096, 8, 8)]
        first = theirs.features[0](F.pad(images, (2, 2, 2, 2)))  # padded by 4 in all
        expected = F.max_pool2d(first.relu(), 3, 2, padding=1)
        assert_close(found[0], expected)
        last = ours.features[6:](found[1])  # 8 x 8 cells
        wanted = theirs.classifier[:6](last[:, :, 1:7, 1:7].flatten(1))
    assert_close(found[2][0, :, 3, 3], wanted[0], rtol=1e-4, atol=1e-5)  # fc6 sees cells 1 to 6 from cell 3


def test_weights_without_a_fitting_classifier_leave_it_as_drawn(theirs: torchvision.models.AlexNet, file: Path):
    ours = AlexNetEncoder(fully_connected=16, weights=file)
    assert_close(ours.features[10].weight, theirs.features[10].weight)
    assert float(ours.fc[0].weight.detach().std()) > 0


def test_it_is_a_body_of_fcn_with_and_without_skips():
    images = torch.rand(2, 3, 70, 45)
    for skips in (0, 1, 2):
        body = AlexNetEncoder(strides=[8, 16, 32][2 - skips :], fully_connected=8)
        model = FCN(num_classes=3, backbone=body, skips=skips)
        assert model(images).shape == (2, 3, 70, 45)
    assert AlexNetEncoder(strides=[16, 32], fully_connected=0)(torch.rand(1, 3, 64, 96))[1].shape == (1, 256, 2, 3)


@pytest.mark.parametrize("strides", [[4, 8], []])
def test_strides_that_are_not_there_are_named(strides: list[int]):
    with pytest.raises(ValueError, match=r"maps of strides \[8, 16, 32\], not"):
        AlexNetEncoder(strides=strides, fully_connected=0)
