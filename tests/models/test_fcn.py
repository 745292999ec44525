from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

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
from segmenter_cases import maps


def body(*strides: int) -> TinyBackbone:
    return TinyBackbone(widths=(8, 8, 16, 16), stem=8, strides=strides)


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


def test_a_new_skip_changes_nothing_at_first():
    """Section 4.3: a finer network starts from the coarser one's weights, and its scores of pool4 from zero."""
    torch.manual_seed(0)
    coarse = FCN(num_classes=3, backbone=body(32)).eval()
    randomise(coarse)
    fine = FCN(num_classes=3, backbone=body(16, 32), skips=1).eval()
    dropped = load_weights(fine, coarse.state_dict(), drop_head=True)  # what init_from and drop_head=true do
    assert sorted(dropped) == ["enlarge.0.weight", "enlarge.1.weight", "skip_scores.0.bias", "skip_scores.0.weight"]
    assert_close(fine.classifier.weight, coarse.classifier.weight)
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        scores = coarse.classifier(coarse.backbone(coarse.normalize(images))[-1])
        assert_close(fine(images), fine.enlarge[1](fine.enlarge[0](scores)))


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


def test_padding_of_a_batch_does_not_reach_the_heads_weights():
    model = FCN(num_classes=3, backbone=body(16, 32), auxiliary=FCNHead)
    terms = model.loss(model(torch.rand(2, 3, 40, 50)), maps((40, 50), (20, 30)))
    torch.stack(list(terms.values())).sum().backward()
    assert float(model.aux_classifier[4].weight.grad.abs().max()) > 0
    other = copy.deepcopy(model).eval()
    outputs = other(torch.rand(1, 3, 40, 50))
    nothing = torch.stack(list(other.loss(outputs, [maps((4, 4))[0]]).values()))
    assert nothing.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"with 1 skips needs 2 maps whose strides double .* has \[32\]"):
        FCN(num_classes=3, backbone=body(32), skips=1)
    with pytest.raises(ValueError, match=r"has \[8, 32\]"):
        FCN(num_classes=3, backbone=body(8, 32), skips=1)
    with pytest.raises(ValueError, match="and an auxiliary head needs 2 maps"):
        FCN(num_classes=3, backbone=body(32), auxiliary=FCNHead)
