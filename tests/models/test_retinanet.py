from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn

from dense_oracle import images, objects, our_backbone, padded, perturb, torchvision_backbone, torchvision_targets
from detseg.models.retinanet import RetinaNet, paper_anchors
from detseg.models.torchvision_weights import ClassLayer, load_torchvision_state
from detseg.nn import BackboneWithFPN, TorchvisionBackbone
from detseg.structures import Target


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, RetinaNet]:
    torch.manual_seed(0)
    theirs = TorchvisionRetinaNet(torchvision_backbone(), 3, detections_per_img=100)
    theirs.transform.resize = lambda image, target: (image, target)  # sizes belong to the data
    perturb(theirs)
    ours = RetinaNet(num_classes=3, backbone=our_backbone())
    load_torchvision_state(ours, theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_predictions_equal_torchvisions(twins: tuple[nn.Module, RetinaNet], count: int) -> None:
    theirs, ours = twins
    batch, sizes = padded(images(count))
    for found, wanted in zip(ours.predict(ours(batch, sizes), sizes), theirs(images(count)), strict=True):
        assert len(found) > 10
        assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-3)
        assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
        assert_close(found.labels, wanted["labels"])


@pytest.mark.parametrize(("count", "empty"), [(1, None), (3, None), (3, 1), (1, 0)])
def test_losses_equal_torchvisions(twins: tuple[nn.Module, RetinaNet], count: int, empty: int | None) -> None:
    theirs, ours = twins
    targets = objects(count, empty=empty)
    batch, sizes = padded(images(count))
    found = ours.loss(ours(batch, sizes), targets)
    theirs.training = True  # its losses exist in this mode alone; the layers stay in eval mode
    wanted = theirs(images(count), torchvision_targets(targets))
    theirs.training = False
    assert_close(found["loss_classification"], wanted["classification"], rtol=1e-4, atol=1e-5)
    assert_close(found["loss_box"], wanted["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert (found["loss_box"].item() == 0.0) == (empty == 0 and count == 1)


def test_all_keys_of_the_resnet50_fit_and_real_classes_are_picked() -> None:
    with torch.device("meta"):
        state = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    rows = torch.arange(91.0).repeat(9)  # nine anchors
    state["head.classification_head.cls_logits.bias"] = rows
    body = TorchvisionBackbone(name="resnet50", weights=None, strides=(8, 16, 32))
    ours = RetinaNet(num_classes=80, backbone=BackboneWithFPN(backbone=body, extra="p6p7_from_p5"))
    load_torchvision_state(ours, state, layers=[ClassLayer("head.classification_head.cls_logits", anchors=9)])
    bias = ours.head.classification_head.cls_logits.bias.view(9, 80)
    assert bias[0, :13].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]  # COCO has no category 12
    assert bias[8, 79] == 90 and bool((bias == bias[0]).all())


def test_the_papers_anchors_are_torchvisions() -> None:
    assert paper_anchors([8, 128]).sizes == ((32.0, 40.0, 50.0), (512.0, 645.0, 812.0))


def test_diagnostics_count_positives_and_easy_negatives(twins: tuple[nn.Module, RetinaNet]) -> None:
    _, ours = twins
    batch, sizes = padded(images(3))
    outputs, targets = ours(batch, sizes), objects(3)
    found = ours.diagnostics(outputs, targets)
    total = sum(float(found[f"positives_p{level}"]) for level in range(3, 8))
    assert total == len(ours.assign(outputs, targets).rows) > 50
    assert 0.0 < float(found["easy_negative_share"]) < 1.0
    none = [Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))] * 3
    outputs.logits = torch.full_like(outputs.logits, -5.0)
    assert_close(float(ours.diagnostics(outputs, none)["easy_negative_share"]), 1.0)
