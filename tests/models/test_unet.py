from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.losses import SegmentationLoss
from detseg.models import BackboneUNet, UNet
from detseg.models.unet import mirror
from detseg.nn import (
    BedOfNails,
    BilinearUpsampling,
    DenseBlock,
    DoubleConvolution,
    InceptionBlock,
    MaxUnpooling,
    NearestUpsampling,
    ResidualDoubleConvolution,
    ResizeConvolution,
    TinyBackbone,
    TransposedConvolution,
)
from detseg.ops.upsampling import bilinear_kernel
from detseg.structures import SemanticMap, Target


def target(labels: torch.Tensor, **fields) -> Target:
    return Target(
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels), **fields
    )


def test_the_papers_network_has_the_papers_sizes():
    with torch.device("meta"):
        model = UNet(num_classes=2)
        assert model.network(torch.zeros(1, 3, 572, 572)).shape == (1, 2, 388, 388)  # figure 1
    assert [block[0].out_channels for block in model.down] == [64, 128, 256, 512, 1024]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 23  # section 2: "In total the network has 23 convolutional layers"
    assert sum(value.numel() for value in model.parameters()) == 31_030_658 + 2 * 9 * 64  # RGB, not grey


def test_valid_convolutions_see_a_mirrored_margin_of_92_pixels():
    model = UNet(num_classes=2, width=2)
    assert model.context(388) == (92, 92)
    for length in (1, 17, 128, 129):
        before, after = model.context(length)
        padded = torch.zeros(1, 3, length + before + after, 188)
        given = model.network(padded).shape[2]
        assert before == 92
        assert length <= given < length + 16


def test_overlapping_tiles_give_the_same_logits_as_the_whole_image():
    model = UNet(num_classes=3, width=2).eval()
    images = torch.rand(1, 3, 48, 40)
    with torch.no_grad():
        whole = model(images)
        continued = mirror(model.normalize(images), (92, 92), (92, 92 + 8))
        tile = model.network(continued[:, :, 16 : 16 + 204, :204])  # 16 rows down, a multiple of 2 ** 4
    assert tile.shape[2:] == (20, 20)
    assert_close(whole[:, :, 16:36, :20], tile)


def test_mirror_of_a_row():
    row = torch.arange(4.0).view(1, 1, 1, 4)
    assert mirror(row, (0, 0), (2, 1)).flatten().tolist() == [2, 1, 0, 1, 2, 3, 2]
    assert mirror(row, (0, 0), (0, 8)).flatten().tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert mirror(row, (1, 2), (0, 0)).shape == (1, 1, 4, 4)
    images = torch.rand(1, 2, 5, 7)
    assert_close(mirror(images, (4, 3), (2, 6)), F.pad(images, (2, 6, 4, 3), mode="reflect"))


def test_mirror_of_a_batch_continues_each_image_at_its_own_edges():
    images = torch.arange(2 * 3 * 5.0).view(2, 1, 3, 5)
    sizes = torch.tensor([[3, 5], [2, 1]])
    found = mirror(images, (1, 2), (2, 1), sizes)
    assert_close(found[:1], mirror(images[:1], (1, 2), (2, 1)))
    assert_close(found[1:], mirror(images[1:, :, :2, :1], (1, 3), (2, 5)))  # to the same canvas
    assert_close(mirror(images, (1, 2), (2, 1), torch.tensor([[3, 5]] * 2)), mirror(images, (1, 2), (2, 1)))


@pytest.mark.parametrize("tile", [None, 16])
def test_logits_do_not_depend_on_the_padding_of_a_batch(tile):
    """What is continued by its mirror picture is the image, not the zeros around it."""
    model = UNet(num_classes=3, width=2, depth=2, tile=tile).eval()
    batch, sizes = torch.rand(3, 3, 64, 96), torch.tensor([[64, 96], [33, 50], [1, 61]])
    with torch.no_grad():
        found = model(batch, sizes)  # (3, 3, 64, 96)
        for own, image, (height, width) in zip(found, batch, sizes.tolist(), strict=True):
            assert_close(own[:, :height, :width], model(image[None, :, :height, :width])[0])


@pytest.mark.parametrize(
    "options", [{"padding": True}, {"padding": True, "norm": True}, {"padding": False, "depth": 2}]
)
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (5, 1)])
def test_logits_have_the_size_of_the_input(options, size):
    assert UNet(num_classes=3, width=2, **options)(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_padded_convolutions_keep_their_size_and_odd_levels_are_an_error():
    model = UNet(num_classes=2, width=2, padding=True)
    assert model.network(torch.rand(1, 3, 32, 48)).shape == (1, 2, 32, 48)
    with pytest.raises(ValueError, match=r"level 1 is \(17, 16\), which 2x2 pooling cannot halve"):
        model.network(torch.rand(1, 3, 34, 32))


def test_initial_deviation_is_the_papers():
    model = UNet(num_classes=2, width=32, depth=1)
    wide = model.down[1][2]  # 3x3, 64 channels in: N = 576
    assert_close(wide.weight.std(), torch.tensor((2 / 576) ** 0.5), rtol=0.03, atol=0)
    up = model.up[0].upsample  # each output pixel of a 2x2 up-convolution sees one pixel of 64 channels
    assert_close(up.weight.std(), torch.tensor((2 / 64) ** 0.5), rtol=0.05, atol=0)
    assert wide.bias.abs().max() == 0


def test_dropout_is_at_the_end_of_the_contracting_path():
    model = UNet(num_classes=2, width=2, depth=2, padding=True, dropout=0.5)
    calls = []
    model.dropout.register_forward_hook(lambda module, given, result: calls.append(tuple(result.shape[1:])))
    model(torch.rand(1, 3, 16, 16))
    assert calls == [(4, 8, 8), (8, 4, 4)]


def test_backbone_unet_uses_every_map_at_its_stride():
    model = BackboneUNet(
        num_classes=4, backbone=TinyBackbone(widths=(8, 12, 16), stem=4, with_stem=True), widths=(16, 8, 8)
    )
    assert [block[0].in_channels for block in model.up] == [16 + 12, 16 + 8, 8 + 4]
    assert model(torch.rand(2, 3, 40, 70)).shape == (2, 4, 40, 70)
    sum(
        model.loss(model(torch.rand(2, 3, 32, 32)), [target(torch.zeros(32, 32, dtype=torch.int64))] * 2).values()
    ).backward()
    assert all(value.grad is not None for value in model.parameters())
    with pytest.raises(ValueError, match=r"got strides \[2, 4, 8, 16\] and 2 widths"):
        BackboneUNet(num_classes=4, backbone=TinyBackbone(widths=(8, 12, 16), with_stem=True), widths=(16, 8))


def test_loss_stacks_maps_of_different_sizes_and_ignores_the_rest():
    model = UNet(num_classes=3, width=2, depth=1, padding=True, loss=SegmentationLoss(dice=1.0))
    logits = torch.randn(2, 3, 6, 8)
    labels = [torch.randint(0, 3, (6, 8)), torch.randint(0, 3, (4, 5))]
    terms = model.loss(logits, [target(value) for value in labels])
    pixels = torch.cat([logits[0].flatten(1), logits[1, :, :4, :5].flatten(1)], dim=1)
    expected = F.cross_entropy(pixels[None], torch.cat([value.flatten() for value in labels])[None])
    assert_close(terms["loss_cross_entropy"], expected)
    assert list(terms) == ["loss_cross_entropy", "loss_dice"]


def test_a_maps_own_ignore_index_is_respected():
    model = UNet(num_classes=2, width=2, depth=1, padding=True)
    labels = torch.tensor([[0, 1], [7, 7]])
    own = Target(
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), semantic=SemanticMap(labels, ignore_index=7)
    )
    logits = torch.randn(1, 2, 2, 2)
    expected = F.cross_entropy(logits[:, :, 0], labels[None, 0])
    assert_close(model.loss(logits, [own])["loss_cross_entropy"], expected)


def test_predictions_are_the_likeliest_class_cropped_to_the_valid_size():
    model = UNet(num_classes=3, width=2, depth=1, padding=True)
    logits = torch.randn(2, 3, 6, 8)
    first, second = model.predict(logits, torch.tensor([[6, 8], [4, 5]]))
    assert torch.equal(first.labels, logits[0].argmax(dim=0))
    assert torch.equal(second.labels, logits[1, :, :4, :5].argmax(dim=0))


def test_touching_objects_weigh_more_when_asked():
    masks = torch.zeros(2, 4, 8, dtype=torch.bool)
    masks[0, :, :3], masks[1, :, 4:] = True, True
    labels = masks.any(dim=0).long()
    boxes = torch.tensor([[0.0, 0, 3, 4], [4, 0, 8, 4]])
    cells = Target(boxes=boxes, labels=torch.tensor([0, 0]), masks=masks, semantic=SemanticMap(labels), image_id=7)
    logits = torch.zeros(1, 2, 4, 8)
    logits[:, 1] = 2.0  # the border between the cells is missed
    plain, separated = (
        UNet(num_classes=2, width=2, depth=1, separation=value).loss(logits, [cells])["loss_cross_entropy"]
        for value in (0.0, 10.0)
    )
    assert separated > 1.5 * plain
    without = Target(boxes=boxes, labels=torch.tensor([0, 0]), semantic=SemanticMap(labels), image_id=7)
    with pytest.raises(ValueError, match=r"image 7 has no instance masks, which separation=10.0 needs"):
        UNet(num_classes=2, width=2, depth=1, separation=10.0).loss(logits, [without])


def test_errors_name_the_image_and_the_numbers():
    model = UNet(num_classes=3, width=2, depth=1, padding=True)
    logits = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="image 5 has label 3, but the model has 3 classes"):
        model.loss(logits, [target(torch.full((4, 4), 3), image_id=5)])
    with pytest.raises(ValueError, match=r"image 5: its map is \(5, 4\), but the logits are \(4, 4\)"):
        model.loss(logits, [target(torch.zeros(5, 4, dtype=torch.int64), image_id=5)])
    with pytest.raises(ValueError, match="image 9 has no semantic map; set truth=semantic"):
        model.loss(logits, [Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), image_id=9)])
    with pytest.raises(ValueError, match="at least 2 classes, got 1; count the background"):
        UNet(num_classes=1)


@pytest.mark.parametrize("size", [(40, 48), (33, 70), (1, 5), (20, 21)])
def test_tiles_give_what_the_whole_image_gives(size):
    whole = UNet(num_classes=3, width=2, depth=2).eval()
    tiled = UNet(num_classes=3, width=2, depth=2, tile=16).eval()
    tiled.load_state_dict(whole.state_dict())
    shapes = []
    tiled.head.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape[2:])))
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert_close(tiled(images), whole(images))
    assert max(max(shape) for shape in shapes) <= 16
    assert len(shapes) >= (size[0] // 16) * (size[1] // 16)


def test_the_papers_tile_is_one_forward_pass_of_572_pixels():
    model = UNet(num_classes=2, width=2, tile=388).eval()
    seen = []
    model.down[0].register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 388, 388)).shape == (1, 2, 388, 388)
    assert seen == [(572, 572)]
    with pytest.raises(ValueError, match=r"tile 390 with depth 4 .* sides 16 n \+ 4, such as 388"):
        UNet(num_classes=2, width=2, tile=390)
    with pytest.raises(ValueError, match="tiles need padding=false"):
        UNet(num_classes=2, width=2, tile=388, padding=True)


def test_regions_stand_for_masks_where_there_are_none():
    labels = torch.zeros(6, 9, dtype=torch.int64)
    labels[:, :3], labels[:, 5:] = 1, 1
    labels[0, 8] = 255
    logits = torch.randn(1, 2, 6, 9)
    masks = torch.stack([labels == 1, labels == 1])
    masks[0, :, 4:], masks[1, :, :4] = False, False
    boxes = torch.tensor([[0.0, 0, 3, 6], [5, 0, 9, 6]])
    told = Target(boxes=boxes, labels=torch.tensor([0, 0]), masks=masks, semantic=SemanticMap(labels))
    model = UNet(num_classes=2, width=2, depth=1, separation=10.0, regions=True)
    first, second = (model.loss(logits, [given])["loss_cross_entropy"] for given in (told, target(labels)))
    assert_close(first, second)
    plain = UNet(num_classes=2, width=2, depth=1).loss(logits, [target(labels)])["loss_cross_entropy"]
    assert abs(float(first - plain)) > 1e-3


@pytest.mark.parametrize(
    "kind", [NearestUpsampling, BilinearUpsampling, BedOfNails, MaxUnpooling, ResizeConvolution, TransposedConvolution]
)
def test_any_way_up(kind):
    model = UNet(num_classes=2, width=2, depth=2, padding=True, upsample=kind)
    result = model(torch.rand(1, 3, 9, 14))
    assert result.shape == (1, 2, 9, 14)
    result.square().sum().backward()
    assert all(value.grad is not None for value in model.parameters())
    if kind is not MaxUnpooling:
        body = TinyBackbone(widths=(8, 8), stem=4, with_stem=True)
        other = BackboneUNet(num_classes=2, backbone=body, widths=(8, 4), upsample=kind)
        assert other(torch.rand(2, 3, 9, 14)).shape == (2, 2, 9, 14)


def test_a_bilinear_start_is_kept():
    start = partial(TransposedConvolution, bilinear=True)
    body = TinyBackbone(widths=(8, 8), stem=4, with_stem=True)
    model = BackboneUNet(num_classes=2, backbone=body, widths=(8, 4), upsample=start)
    assert_close(model.enlarge[0].weight[0, 0], bilinear_kernel(4, 2))


@pytest.mark.parametrize("kind", [DoubleConvolution, ResidualDoubleConvolution, DenseBlock, InceptionBlock])
@pytest.mark.parametrize("padding", [True, False])
def test_any_block_at_each_level(kind, padding):
    model = UNet(num_classes=2, width=4, depth=2, padding=padding, norm=True, block=kind).eval()
    images = torch.rand(1, 3, 18, 25)
    assert model(images).shape == (1, 2, 18, 25)
    if padding:
        return
    tiled = UNet(num_classes=2, width=4, depth=2, norm=True, block=kind, tile=16).eval()
    tiled.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_close(tiled(images), model(images))


@pytest.mark.parametrize("choice", ["double", "residual", "dense", "inception"])
def test_blocks_are_a_config_group(choice):
    cfg = load_config("model=unet_small", f"block@model.block={choice}")
    cfg.data.num_classes = 3
    model = instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model")
    logits = model(torch.rand(2, 3, 16, 20))
    sum(model.loss(logits, [target(torch.zeros(16, 20, dtype=torch.int64))] * 2).values()).backward()
    assert all(value.grad is not None for value in model.parameters())
