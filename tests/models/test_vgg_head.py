from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.vgg import VGG, make_layers

from detseg.models.vgg_head import VGGHead
from detseg.nn import CheckpointMismatch


def small_vgg(width: int = 6) -> VGG:
    """torchvision's own class with three channels and narrow layers: the keys are those of the published file."""
    network = VGG(make_layers([4, "M", 8]), num_classes=5)
    network.classifier[0] = torch.nn.Linear(8 * 7 * 7, width)
    network.classifier[3] = torch.nn.Linear(width, width)
    return network.eval()


def test_a_region_gets_what_the_networks_classifier_makes_of_it(tmp_path: Path) -> None:
    network = small_vgg()
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    head = VGGHead(shape=(8, 7, 7), width=6, weights=tmp_path / "vgg.pth").eval()
    regions = torch.rand(3, 8, 7, 7)
    assert_close(head(regions), network.classifier[:6](regions.flatten(1)))
    assert head.out_features == 6


def test_dropout_works_in_training_alone() -> None:
    head, regions = VGGHead(shape=(8, 7, 7), width=64), torch.rand(2, 8, 7, 7)
    zeros = [(head.train(mode)(regions) == 0).float().mean() for mode in (True, False)]
    assert zeros[0] > zeros[1] + 0.1  # half of what the ReLU left


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(small_vgg().state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(CheckpointMismatch, match=r"fc6\.weight"):
        VGGHead(shape=(8, 6, 6), width=6, weights=tmp_path / "vgg.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointMismatch, match=r"fc6"):
        VGGHead(shape=(8, 7, 7), width=6, weights=tmp_path / "other.pth")


def test_published_weights_go_by_torchvisions_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    state = small_vgg().state_dict()

    class Published:
        def __init__(self, name: str) -> None:
            asked.append(name)

        def get_state_dict(self, *, check_hash: bool) -> dict[str, torch.Tensor]:
            assert check_hash
            return state

    class Names:
        def __class_getitem__(cls, name: str) -> Published:
            return Published(name)

    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: Names if name == "vgg16" else None)
    head = VGGHead(shape=(8, 7, 7), width=6, weights="default")
    VGGHead(shape=(8, 7, 7), width=6, weights="IMAGENET1K_FEATURES")
    assert asked == ["DEFAULT", "IMAGENET1K_FEATURES"]
    assert_close(head.fc7.weight, state["classifier.3.weight"])
