from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import fcos_resnet50_fpn

from dense_oracle import images, objects, our_backbone, padded, perturb, torchvision_backbone, torchvision_targets
from detseg.models.fcos import FCOS
from detseg.models.torchvision_weights import load_torchvision_state
from detseg.nn import BackboneWithFPN, TorchvisionBackbone
from detseg.structures import Target


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, FCOS]:
    torch.manual_seed(0)
    theirs = TorchvisionFCOS(torchvision_backbone(), 3)
    theirs.transform.resize = lambda image, target: (image, target)  # sizes belong to the data
    perturb(theirs)
    ours = FCOS(num_classes=3, backbone=our_backbone(), score_threshold=0.2)
    load_torchvision_state(ours, theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_predictions_equal_torchvisions(twins: tuple[nn.Module, FCOS], count: int) -> None:
    theirs, ours = twins
    batch, sizes = padded(images(count))
    for found, wanted in zip(ours.predict(ours(batch, sizes), sizes), theirs(images(count)), strict=True):
        assert len(found) > 10
        assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-3)
        assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
        assert_close(found.labels, wanted["labels"])


@pytest.mark.parametrize(("count", "empty"), [(1, None), (3, None), (3, 1), (1, 0)])
def test_losses_equal_torchvisions(twins: tuple[nn.Module, FCOS], count: int, empty: int | None) -> None:
    theirs, ours = twins
    targets = objects(count, empty=empty)
    batch, sizes = padded(images(count))
    found = ours.loss(ours(batch, sizes), targets)
    theirs.training = True  # its losses exist in this mode alone; the layers stay in eval mode
    wanted = theirs(images(count), torchvision_targets(targets))
    theirs.training = False
    assert_close(found["loss_classification"], wanted["classification"], rtol=1e-4, atol=1e-5)
    assert_close(found["loss_box"], wanted["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert_close(found["loss_centerness"], wanted["bbox_ctrness"], rtol=1e-4, atol=1e-5)
    assert (found["loss_box"].item() == 0.0) == (empty == 0 and count == 1)


def test_all_keys_of_the_resnet50_fit() -> None:
    with torch.device("meta"):
        state = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    body = TorchvisionBackbone(name="resnet50", weights=None, strides=(8, 16, 32))
    ours = FCOS(num_classes=91, backbone=BackboneWithFPN(backbone=body, extra="p6p7_from_p5"))
    own = {key: tuple(value.shape) for key, value in ours.state_dict().items() if not key.startswith("normalize.")}
    assert own == {key: tuple(value.shape) for key, value in state.items()}


def test_diagnostics_count_points_that_two_boxes_claim(twins: tuple[nn.Module, FCOS]) -> None:
    _, ours = twins
    outputs = ours(torch.rand(1, 3, 64, 64))
    labels = torch.zeros(2, dtype=torch.int64)
    boxes = torch.tensor([[4.0, 4, 36, 36], [12, 4, 44, 36]])  # nine points of the first; two of its columns are shared
    found = ours.diagnostics(outputs, [Target(boxes=boxes, labels=labels)])
    rows = [point for point in (8, 16, 24, 32) if abs(point - 20) < 12]
    first = [x for x in (8, 16, 24, 32, 40) if abs(x - 20) < 12 and 4 < x < 36]
    second = [x for x in (8, 16, 24, 32, 40) if abs(x - 28) < 12 and 12 < x < 44]
    both, either = set(first) & set(second), set(first) | set(second)
    assert_close(float(found["ambiguous_points"]), len(both) / len(either))
    assert float(found["positives_p3"]) == len(either) * len(rows) and float(found["positives_p4"]) == 0
    none = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert float(ours.diagnostics(outputs, [none])["ambiguous_points"]) == 0.0
