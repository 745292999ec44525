from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.models.smp import SMP
from segmenter_cases import maps

ARCHES = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet"]
ARCHES += ["Segformer", "DPT"]
PAIRS = [(arch, "tu-mobilenetv3_small_050") for arch in ARCHES] + [("DPT", "tu-vit_tiny_patch16_224")]


def test_every_architecture_of_the_library_is_tested():
    kinds = [kind for kind in vars(smp).values() if isinstance(kind, type)]
    assert {kind.__name__ for kind in kinds if issubclass(kind, smp.base.SegmentationModel)} == set(ARCHES)


@pytest.mark.parametrize(("arch", "encoder"), PAIRS)
def test_every_architecture_takes_every_size(arch, encoder):
    model = SMP(num_classes=3, arch=arch, encoder=encoder).eval()
    for size in ((33, 50), (1, 5), (64, 64), (70, 130)):
        with torch.no_grad():
            assert model(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_a_transformer_of_patches_trains_at_any_size():
    model = SMP(num_classes=3, arch="DPT", encoder="tu-vit_tiny_patch16_224").train()
    model.loss(model(torch.rand(2, 3, 33, 50)), maps((33, 50), (33, 50)))["loss_cross_entropy"].backward()
    places = model.network.encoder.model.pos_embed  # of 224 x 224 pixels, interpolated to those of the image
    assert float(places.grad.abs().max()) > 0


def test_logits_are_the_librarys():
    model = SMP(num_classes=3, arch="fpn", encoder="resnet18", options={"decoder_segmentation_channels": 32}).eval()
    theirs = smp.FPN("resnet18", encoder_weights=None, classes=3, decoder_segmentation_channels=32).eval()
    theirs.load_state_dict(model.network.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(model(images), theirs(model.normalize(images)))


def test_the_command_line_of_a_segformer():
    cfg = load_config("model=smp", "model.arch=Segformer", "model.encoder=tu-convnext_atto")
    cfg.data.num_classes = 4
    model = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()
    assert type(model.network).__name__ == "Segformer"
    with torch.no_grad():
        assert model(torch.rand(1, 3, 40, 70)).shape == (1, 4, 40, 70)


def test_errors_name_what_there_is():
    with pytest.raises(ValueError, match=r"no architecture 'Unot'; it has .*DeepLabV3Plus.*Unet"):
        SMP(num_classes=3, arch="Unot")
    with pytest.raises(ValueError, match=r"Unet has no option 'decoder_width'; it has .*decoder_channels"):
        SMP(num_classes=3, arch="Unet", options={"decoder_width": 3})
    with pytest.raises(ValueError, match="cannot be built with encoder 'resnet1'"):
        SMP(num_classes=3, arch="Unet", encoder="resnet1")
    for encoder in ("tu-eva02_tiny_patch14_224", "tu-vit_relpos_small_patch16_224"):  # no power of two; one size alone
        with pytest.raises(ValueError, match=rf"DPT over '{encoder}' takes no image of 64 x 96: .*; use .*patch16"):
            SMP(num_classes=3, arch="DPT", encoder=encoder)
    model = SMP(num_classes=3, arch="DeepLabV3Plus", encoder="tu-mobilenetv3_small_050").train()
    with pytest.raises(ValueError, match="trains on batches of 2 images or more"):
        model(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("encoder", ["tu-hf-hub:someone/something", "tu-local-dir:/somewhere"])
def test_an_encoder_is_never_fetched_from_a_place_of_its_own(encoder):
    section = {"_target_": "detseg.models.smp.SMP", "num_classes": 3, "arch": "Unet", "encoder": encoder}
    with pytest.raises(ValueError, match=encoder):
        instantiate(section, path="model")
