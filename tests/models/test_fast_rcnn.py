from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import roi_pool

from detseg.models import FastRCNN, SPPNet
from detseg.models.box_branch import BoxBranch, TwoLayerHead
from detseg.models.pyramid_pooling import PyramidPooling
from detseg.models.region_features import RegionFeatures, RegionPool
from detseg.nn import TinyBackbone
from detseg.nn.svd import TruncatedSVD
from detseg.structures import Target
from detseg.targets.matchers import IoUMatcher
from detseg.targets.samplers import BalancedSampler


class Grid:
    """Proposes squares of 24 pixels, 8 apart."""

    key = "grid"

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = range(0, image.shape[1] - 23, 8), range(0, image.shape[2] - 23, 8)
        return torch.tensor([[x, y, x + 24, y + 24] for y in rows for x in columns]).float().reshape(-1, 4)


def model(
    kind: type[FastRCNN] | type[SPPNet] = FastRCNN, pooling: RegionFeatures | None = None, **options: object
) -> FastRCNN | SPPNet:
    box = partial(
        BoxBranch,
        pooling=pooling or RegionPool(output_size=3),
        head=partial(TwoLayerHead, width=16),
        matcher=IoUMatcher(positive=0.5, negative=0.5, allow_low_quality=False, lowest=0.1),
        sampler=BalancedSampler(size=64, positive_fraction=0.25),
        score_threshold=0.01,
        **options,
    )
    backbone = TinyBackbone(widths=(8, 12), stem=6, strides=[8])
    return kind(num_classes=3, backbone=backbone, proposer=Grid(), box=box)


def batch() -> tuple[Tensor, Tensor, list[Target]]:
    boxes = torch.tensor([[8.0, 8, 32, 30], [30, 20, 52, 45]])
    targets = [Target(boxes=boxes, labels=torch.tensor([0, 2])), Target(boxes=boxes[:0], labels=torch.zeros(0).long())]
    return torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [50, 60]]), targets


def test_a_mini_batch_has_regions_of_few_images_by_the_papers_shares() -> None:
    images, sizes, targets = batch()
    samples = model()(images, sizes, targets).samples
    assert samples is not None
    labels, boxes = samples.labels[0], samples.boxes[0]
    assert (labels > 0).sum() <= 16 and len(labels) <= 64  # 64 of each of 2 images, a quarter objects (section 2.3)
    overlap = torch.tensor([[0.0]])
    for box in boxes[labels == 0]:
        top_left = torch.maximum(box[:2], targets[0].boxes[:, :2])
        inner = (torch.minimum(box[2:], targets[0].boxes[:, 2:]) - top_left).clamp(min=0).prod(dim=1)
        area = (targets[0].boxes[:, 2:] - targets[0].boxes[:, :2]).prod(dim=1)
        overlap = (inner / (area + 24 * 24 - inner)).max()
        assert 0.1 <= overlap < 0.5
    assert len(samples.labels[1]) == 20 and not samples.labels[1].any()  # no object: all 4 x 5 windows are background


@torch.no_grad()
def test_regions_are_read_from_the_shared_map() -> None:
    detector, (images, sizes, _) = model().eval(), batch()
    outputs = detector(images, sizes)
    regions = torch.tensor([[0.0, 8, 8, 32, 32], [1, 0, 16, 24, 40]])
    expected = detector.box.head(roi_pool(outputs.features[0], regions, 3, 1 / 8))
    assert_close(detector.box.embed(outputs.features, regions, [8]), expected)


@torch.no_grad()
def test_spp_net_with_one_level_equals_fast_rcnn() -> None:
    """The shared-convolution identity: same weights, same regions, same detections."""
    images, sizes, _ = batch()
    fast = model().eval()
    spp = model(SPPNet, PyramidPooling(bins=(3,))).eval()
    spp.load_state_dict(fast.state_dict(), strict=False)
    for one, two in zip(fast.predict(fast(images, sizes), sizes), spp.predict(spp(images, sizes), sizes), strict=True):
        assert len(one) > 0
        assert_close(one.boxes, two.boxes)
        assert_close(one.scores, two.scores)


@torch.no_grad()
def test_truncated_svd_changes_predictions_as_the_rank_says_and_losses_never() -> None:
    images, sizes, targets = batch()
    plain = model().eval()
    found = {}
    for rank in (1, 16):
        thin = model(compress=TruncatedSVD(ranks={"fc6": rank, "fc7": rank})).eval()
        thin.load_state_dict(plain.state_dict())
        outputs = thin(images, sizes)
        found[rank] = thin.predict(outputs, sizes)[0]
        torch.manual_seed(0)
        losses = thin.loss(thin(images, sizes, targets), targets)
        torch.manual_seed(0)
        assert losses == plain.loss(plain(images, sizes, targets), targets)
    whole = plain.predict(plain(images, sizes), sizes)[0]
    assert_close(found[16].scores, whole.scores, rtol=1e-4, atol=1e-5)
    assert found[1].scores.shape != whole.scores.shape or not torch.allclose(found[1].scores, whole.scores, atol=1e-4)


def test_frozen_convolutions_learn_nothing_and_keep_their_statistics() -> None:
    images, sizes, targets = batch()
    detector = model(SPPNet, PyramidPooling())
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    sum(detector.loss(detector(images, sizes, targets), targets).values()).backward()
    assert all(value.grad is None for value in detector.backbone.parameters())
    assert all(value.grad is not None for value in detector.box.parameters())
    for name, value in detector.train().backbone.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    assert {"stages.0.0.body.1.running_mean"} <= set(before)


@pytest.mark.parametrize("kind", [FastRCNN, SPPNet])
def test_an_image_smaller_than_every_window_has_no_detections(kind: type[FastRCNN] | type[SPPNet]) -> None:
    detector = model(kind).eval()
    sizes = torch.tensor([[20, 20]])
    assert [len(found) for found in detector.predict(detector(torch.rand(1, 3, 32, 32), sizes), sizes)] == [0]
