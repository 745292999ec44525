from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from detseg.models.dense import DenseOutputs
from detseg.models.ssdlite import SSDLite
from detseg.nn import BackboneWithExtras, MobileNetV3
from ssd_oracle import Given, liven, objects, torchvision_losses, torchvision_outputs

EXTRA = [[512, 3, 2, 1], [256, 3, 2, 1], [256, 3, 2, 1], [128, 3, 2, 1]]
SIZES = torch.tensor([[320, 320]] * 2)


def norm_numbers(model: nn.Module) -> list[tuple[int, float, float]]:
    return [(m.num_features, m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> tuple[nn.Module, SSDLite, DenseOutputs]:
    """Both models, and what ours says about the images; the body of theirs runs no more."""
    torch.manual_seed(0)
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    theirs.transform.resize = lambda image, target: (image, target)  # sizes belong to the data
    levels = liven(theirs.eval(), images)
    path = tmp_path_factory.mktemp("weights") / "ssdlite.pth"
    torch.save(theirs.state_dict(), path)
    backbone = BackboneWithExtras(
        backbone=MobileNetV3(reduced_tail=True), extra=EXTRA, kind="separable", norm_momentum=0.03
    )
    ours = SSDLite(num_classes=3, backbone=backbone, weights=path).eval()
    with torch.no_grad():
        outputs = ours(images, SIZES)
    numbers = norm_numbers(theirs)
    assert numbers == norm_numbers(ours) and len(numbers) > 60
    theirs.backbone = Given(levels)
    return theirs, ours, outputs


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand((2, 3, 320, 320), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_outputs_and_predictions_equal_torchvisions(
    twins: tuple[nn.Module, SSDLite, DenseOutputs], images: Tensor
) -> None:
    theirs, ours, outputs = twins
    logits, deltas = torchvision_outputs(theirs, images)
    assert logits.shape == (2, 3234, 4)
    assert float(logits.std()) > 1.0
    assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-4)
    assert_close(outputs.regression, deltas, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(ours.predict(outputs, SIZES), theirs(list(images)), strict=True):
        assert len(found) > 50
        assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-2)
        assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
        assert_close(found.labels, wanted["labels"] - 1)


@pytest.mark.parametrize("empty", [None, 0])
@torch.no_grad()
def test_losses_equal_torchvisions(
    twins: tuple[nn.Module, SSDLite, DenseOutputs], images: Tensor, empty: int | None
) -> None:
    theirs, ours, outputs = twins
    targets = objects(2, 320, empty=empty)
    found = ours.loss(outputs, targets)
    wanted = torchvision_losses(theirs, images, targets)
    assert found.keys() == wanted.keys() and min(wanted.values()) > 0.1
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_published_weights_bring_their_mean_and_the_limits_are_torchvisions(
    twins: tuple[nn.Module, SSDLite, DenseOutputs],
) -> None:
    theirs, ours, _ = twins
    assert_close(ours.normalize.mean, torch.full((3,), 0.5))
    assert_close(ours.normalize.std, torch.full((3,), 0.5))
    assert (theirs.score_thresh, theirs.topk_candidates) == (ours.score_threshold, ours.top_k)
    assert (theirs.detections_per_img, theirs.nms_thresh) == (ours.max_detections, ours.nms.threshold)
