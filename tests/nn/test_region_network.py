from pathlib import Path

import pytest
import torch
import torchvision
from torch.testing import assert_close

from detseg.nn import TinyBackbone
from detseg.nn.region_network import BackboneNetwork, ClassifierNetwork
from detseg.nn.weights import CheckpointMismatch


@pytest.mark.parametrize(
    ("name", "side", "numbers"),
    [("alexnet", 227, 9216), pytest.param("vgg11", 64, 25088, marks=pytest.mark.slow)],  # 133 million random weights
)
def test_is_torchvisions_network_without_its_last_layer(name: str, side: int, numbers: int, tmp_path: Path) -> None:
    theirs = torchvision.models.get_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = ClassifierNetwork(shape=(3, side, side), name=name, weights=tmp_path / "weights.pth").eval()
    assert (ours.map_features, ours.out_features) == (numbers, 4096)
    crops = torch.randn(2, 3, side, side)
    with torch.no_grad():
        maps = ours.maps(crops)
        assert maps.shape == (2, numbers)
        assert_close(theirs.classifier[-1](ours.vectors(maps)), theirs(crops))
        assert_close(ours(crops), ours.vectors(maps))
    assert set(theirs.state_dict()) - set(ours.state_dict()) == {"classifier.6.weight", "classifier.6.bias"}


def test_other_classes_in_a_file_do_not_matter_and_other_layers_do(tmp_path: Path) -> None:
    state = torchvision.models.alexnet(num_classes=7).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    ours = ClassifierNetwork(shape=(3, 67, 67), weights=tmp_path / "weights.pth")
    assert_close(ours.classifier[4].weight.detach(), state["classifier.4.weight"])
    del state["classifier.4.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointMismatch, match=r"classifier\.4\.weight"):
        ClassifierNetwork(shape=(3, 67, 67), weights=tmp_path / "weights.pth")


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="resnet18 has no fully connected layer below its classes"):
        ClassifierNetwork(shape=(3, 64, 64), name="resnet18")
    with pytest.raises(ValueError, match="densenet121 has no fully connected layer"):
        ClassifierNetwork(shape=(3, 64, 64), name="densenet121")
    with pytest.raises(ValueError, match="no network 'alexnett'"):
        ClassifierNetwork(shape=(3, 64, 64), name="alexnett")
    with pytest.raises(ValueError, match=r"alexnet cannot read crops of \(3, 16, 16\)"):
        ClassifierNetwork(shape=(3, 16, 16))
    with pytest.raises(ValueError, match="widths is empty"):
        BackboneNetwork(shape=(3, 32, 32), backbone=TinyBackbone(), widths=[])


def test_a_body_with_layers_of_its_own() -> None:
    body = TinyBackbone(widths=(8, 12), stem=6)
    body.mean = [0.1, 0.2, 0.3]
    network = BackboneNetwork(shape=(3, 32, 32), backbone=body, output_size=2, widths=[20, 10])
    assert (network.map_features, network.out_features) == (48, 10)
    assert network.mean == [0.1, 0.2, 0.3] and network.training and body.stem[1].training
    assert body.stem[1].num_batches_tracked == 0
    crops = torch.randn(4, 3, 32, 32)
    network.eval()
    maps = network.maps(crops)
    expected = torch.nn.functional.avg_pool2d(body(crops)[-1], 2).flatten(1)  # 4 x 4 cells to 2 x 2
    assert_close(maps, expected)
    hidden = (network.layers[1](expected)).relu()
    assert_close(network(crops), network.layers[4](hidden).relu())
    assert network(torch.zeros(0, 3, 32, 32)).shape == (0, 10)
    network.train()(crops).sum().backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []
