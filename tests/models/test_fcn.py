from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.models.fcn import FCN, FCNHead, score
from detseg.models.segmenter import SegmenterOutputs
from detseg.nn import (
    CheckpointMismatch,
    DilatedResNet,
    NearestUpsampling,
    TinyBackbone,
    TransposedConvolution,
    VGGEncoder,
    load_weights,
)
from segmenter_cases import maps, target
from shared import REPO


def body(*strides: int) -> TinyBackbone:
    return TinyBackbone(widths=(8, 8, 16, 16), stem=8, strides=strides)


WAYS = sorted(path.stem for path in (REPO / "conf" / "upsample").glob("*.yaml") if path.stem != "max_unpooling")
"""Ways to enlarge scores; FCN pools nothing that max-unpooling could undo."""


def way_up(name: str) -> Any:
    cfg = load_config("model=fcn8s", f"upsample@model.upsample={name}")
    return instantiate(OmegaConf.to_container(cfg.model.upsample), path="model.upsample")


def randomise(model: nn.Module) -> None:
    """Scores start at zero: a network that says something needs others."""
    for layer in [model.classifier, *model.skip_scores]:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)


def test_torchvisions_network_outputs_and_loss(tmp_path):
    torch.manual_seed(3)
    theirs = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "fcn.pth")
    head = FCNHead
    ours = FCN(
        num_classes=4,
        backbone=DilatedResNet(),
        head=head,
        auxiliary=head,
        upsample=None,
        weights=tmp_path / "fcn.pth",
    ).eval()
    images = torch.rand(2, 3, 70, 93)  # no multiples of 8
    with torch.no_grad():
        outputs, expected = ours(images), theirs(ours.normalize(images))
        assert isinstance(outputs, SegmenterOutputs)
        assert_close(outputs.logits, expected["out"])
        terms = ours.loss(outputs, truth := maps((70, 93), (70, 93), classes=4))
    labels = torch.stack([one.semantic.labels for one in truth])
    parts = {name: F.cross_entropy(value, labels, ignore_index=255) for name, value in expected.items()}
    assert_close(terms["loss_cross_entropy"], parts["out"])
    assert_close(terms["loss_auxiliary_cross_entropy"], 0.5 * parts["aux"])
    assert list(terms) == ["loss_cross_entropy", "loss_auxiliary_cross_entropy"]
    with pytest.raises(CheckpointMismatch, match="keys of another shape"):
        FCN(
            num_classes=5,
            backbone=DilatedResNet(),
            head=head,
            auxiliary=head,
            upsample=None,
            weights=tmp_path / "fcn.pth",
        )
    bare = FCN(num_classes=4, backbone=DilatedResNet(), head=head, upsample=None, weights=tmp_path / "fcn.pth").eval()
    with torch.no_grad():
        assert_close(bare(images), expected["out"])


def test_the_published_names_are_offered():
    with pytest.raises(ValueError, match=r"fcn_resnet50 has weights COCO_WITH_VOC_LABELS_V1"):
        FCN(num_classes=21, backbone=body(32), upsample=None, weights="COCO_V9")


@pytest.mark.parametrize("skips", [0, 1, 2])
def test_scores_are_fused_as_in_figure_3(skips):
    model = FCN(num_classes=3, backbone=body(*(8, 16, 32)[2 - skips :]), skips=skips).eval()
    randomise(model)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        logits = model(images)
        found = model.backbone(model.normalize(images))
        scores = model.classifier(found[-1])
        for level in range(skips):
            finer = model.skip_scores[level](found[-2 - level])
            scores = finer + model.enlarge[level](scores)
        factor = 32 // 2**skips
        wanted = F.interpolate(scores, scale_factor=float(factor), mode="bilinear", align_corners=False)
    assert model.enlarge[-1].factor == factor
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    assert_close(logits[inner], wanted[inner])


def test_what_learns_is_the_papers():
    model = FCN(num_classes=3, backbone=body(8, 16, 32), skips=2)
    assert [any(value.requires_grad for value in layer.parameters()) for layer in model.enlarge] == [True, True, False]
    assert all(float(layer.weight.detach().abs().max()) == 0 for layer in [model.classifier, *model.skip_scores])
    learnt = FCN(num_classes=3, backbone=body(32), learn_last=True)
    assert learnt.enlarge[0].weight.requires_grad
    kept = partial(TransposedConvolution, bilinear=True, learn=False)
    assert not FCN(num_classes=3, backbone=body(32), upsample=kept, learn_last=True).enlarge[0].weight.requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_every_way_up_but_a_last_one_that_interpolates(way):
    torch.manual_seed(0)
    model = FCN(num_classes=3, backbone=body(8, 16, 32), skips=2, upsample=way_up(way))
    randomise(model)
    terms = model.loss(model(torch.rand(2, 3, 64, 96)), maps((64, 96), (64, 96)))
    torch.stack(list(terms.values())).sum().backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
    still = {"enlarge.2.weight"} if way == "transposed_bilinear" else set()
    assert {name for name, _ in model.named_parameters()} - moved == still


@pytest.mark.parametrize("skips", [0, 1])
def test_a_new_skip_changes_nothing_at_first_but_the_kinks_of_interpolation(skips):
    """Section 4.3: a finer network starts from the coarser one's weights, and its new scores from zero.

    Enlarged in two steps, scores are the same wherever both steps stay on one straight piece: between the quarter
    points of the way from cell to cell. Elsewhere a chord of half a cell cuts off the kink, by an eighth of the second
    difference on each axis.
    """
    torch.manual_seed(0)
    strides = (8, 16, 32)
    coarse = FCN(num_classes=3, backbone=body(*strides[2 - skips :]), skips=skips).eval()
    randomise(coarse)
    fine = FCN(num_classes=3, backbone=body(*strides[1 - skips :]), skips=skips + 1).eval()
    dropped = load_weights(fine, coarse.state_dict(), drop_head=True)  # what init_from and drop_head=true do
    new = [f"skip_scores.{skips}.bias", f"skip_scores.{skips}.weight"]
    assert sorted(dropped) == [f"enlarge.{skips}.weight", f"enlarge.{skips + 1}.weight", *new]
    fused: list[torch.Tensor] = []  # scores before the last enlargement
    coarse.enlarge[-1].register_forward_pre_hook(lambda module, given: fused.append(given[0]))
    images = torch.rand(1, 3, 256, 320)
    with torch.no_grad():
        before, after = coarse(images), fine(images)  # (1, 3, 256, 320) each
    factor = coarse.enlarge[-1].factor
    kinks = sum(float(fused[0].diff(n=2, dim=axis).abs().max()) / 8 for axis in (2, 3))
    inner = (..., slice(factor, -factor), slice(factor, -factor))  # beyond, the zeros around a map count
    change = (after - before)[inner]  # (1, 3, h, w)
    rows, columns = (((torch.arange(side) + 0.5) / factor + 0.5) % 1 for side in change.shape[2:])  # from cell to cell
    straight = ((rows - 0.5).abs() < 0.25)[:, None] & ((columns - 0.5).abs() < 0.25)  # (h, w)
    assert float(straight.float().mean()) == 0.25
    assert_close(change[..., straight], torch.zeros_like(change[..., straight]), rtol=0, atol=1e-4)
    assert 0 < float(change.abs().max()) <= kinks
    same = before.argmax(1) == after.argmax(1)  # (1, 256, 320)
    assert float(same.float().mean()) > 0.95


def test_the_papers_body_has_the_papers_size():
    with torch.device("meta"):
        body_of_paper = VGGEncoder(fully_connected=4096, strides=(8, 16, 32))
        count = sum(value.numel() for value in body_of_paper.parameters())
        head = sum(value.numel() for value in score(channels=4096, num_classes=21).parameters())
    assert count == 14_714_688 + 102_764_544 + 16_781_312  # the convolutions, fc6, fc7
    assert head == 4097 * 21


@pytest.mark.parametrize("upsample", [None, NearestUpsampling, partial(TransposedConvolution, bilinear=True)])
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (5, 1), (1, 70)])
def test_logits_have_the_size_of_the_input(upsample, size):
    model = FCN(num_classes=3, backbone=body(8, 16, 32), skips=2, upsample=upsample)
    logits = model(torch.rand(1, 3, *size))
    assert logits.shape == (1, 3, *size)


def test_what_stands_in_the_padding_of_a_batch_reaches_no_gradient():
    """Neither pixels nor labels of it: images are zero there once they are normalised, and the loss ignores it."""
    torch.manual_seed(0)
    model = FCN(num_classes=3, backbone=body(16, 32), auxiliary=FCNHead).train()
    randomise(model)
    images, sizes, truth = torch.rand(2, 3, 70, 50), torch.tensor([[70, 50], [20, 30]]), maps((70, 50), (20, 30))
    noisy = images.clone()
    noisy[1, :, 20:], noisy[1, :, :, 30:] = 7.0, -7.0

    def gradients(pixels: torch.Tensor, told: torch.Tensor | None) -> dict[str, torch.Tensor]:
        twin = copy.deepcopy(model)
        torch.manual_seed(1)  # of the dropout
        outputs = twin(pixels, told)
        outputs.logits.retain_grad()
        torch.stack(list(twin.loss(outputs, truth).values())).sum().backward()
        slopes = outputs.logits.grad.abs().sum(1)  # (2, 70, 50)
        assert float(slopes[1, 20:].max()) == float(slopes[1, :, 30:].max()) == 0
        assert float(slopes[1, :20, 8:30].min()) > 0  # the strip before is ignored
        return {name: value.grad for name, value in twin.named_parameters() if value.requires_grad}

    clean = gradients(images, sizes)
    assert all(float(clean[f"{head}.weight"].abs().max()) > 0 for head in ("classifier", "aux_classifier.4"))
    assert_close(gradients(noisy, sizes), clean, rtol=0, atol=0)
    unaware = gradients(noisy, None)  # as if all of it were image
    assert not torch.allclose(unaware["classifier.weight"], clean["classifier.weight"], rtol=1e-2)


def test_an_image_whose_pixels_do_not_count_leaves_the_heads_a_gradient_of_zero():
    model = FCN(num_classes=3, backbone=body(16, 32), auxiliary=FCNHead).eval()
    terms = model.loss(model(torch.rand(1, 3, 40, 50)), [target(torch.full((4, 4), 255))])
    torch.stack(list(terms.values())).sum().backward()
    slopes = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(slope is not None and float(slope.abs().max()) == 0 for slope in slopes)  # none is missing under DDP


def test_errors():
    with pytest.raises(ValueError, match=r"with 1 skips needs 2 maps whose strides double .* has \[32\]"):
        FCN(num_classes=3, backbone=body(32), skips=1)
    with pytest.raises(ValueError, match=r"has \[8, 32\]"):
        FCN(num_classes=3, backbone=body(8, 32), skips=1)
    with pytest.raises(ValueError, match="and an auxiliary head needs 2 maps"):
        FCN(num_classes=3, backbone=body(32), auxiliary=FCNHead)
