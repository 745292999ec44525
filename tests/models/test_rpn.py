import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.models.rpn import RegionProposalNetwork, RPNOutputs
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator
from detseg.targets.samplers import BalancedSampler

IMAGE = (64, 96)


def network(**options: object) -> RegionProposalNetwork:
    anchors = AnchorGenerator(sizes=[[16], [32]], ratios=[[0.5, 1.0, 2.0]])
    return RegionProposalNetwork(channels=8, anchors=anchors, **options)  # type: ignore[arg-type]


def features() -> list[Tensor]:
    return [torch.randn(2, 8, 8, 12), torch.randn(2, 8, 4, 6)]


def sizes() -> Tensor:
    return torch.tensor([IMAGE, (50, 70)])


def test_head_is_shared_and_in_the_order_of_the_anchors() -> None:
    rpn, maps = network(), features()
    outputs = rpn(maps, IMAGE)
    assert outputs.objectness.shape == (2, (8 * 12 + 4 * 6) * 3)
    assert outputs.deltas.shape == (2, (8 * 12 + 4 * 6) * 3, 4)
    # Cell (row 2, column 5) of the second level, its third anchor.
    index = (8 * 12 + 2 * 6 + 5) * 3 + 2
    hidden = rpn.head.conv(maps[1])
    assert_close(outputs.objectness[:, index], rpn.head.cls_logits(hidden)[:, 2, 2, 5])
    assert_close(outputs.deltas[:, index], rpn.head.bbox_pred(hidden)[:, 8:12, 2, 5])
    assert_close((outputs.lattice.boxes[index, :2] + outputs.lattice.boxes[index, 2:]) / 2, torch.tensor([80.0, 32.0]))


def test_the_convolution_may_be_wider_or_narrower_than_the_map() -> None:
    rpn = network(width=5, depth=2)
    shapes = {key: tuple(value.shape) for key, value in rpn.head.state_dict().items() if key.endswith("weight")}
    assert shapes == {
        "conv.0.0.weight": (5, 8, 3, 3),
        "conv.1.0.weight": (5, 5, 3, 3),
        "cls_logits.weight": (3, 5, 1, 1),
        "bbox_pred.weight": (12, 5, 1, 1),
    }
    assert rpn(features(), IMAGE).deltas.shape == (2, (8 * 12 + 4 * 6) * 3, 4)
    assert network().head.conv[0][0].weight.shape == (8, 8, 3, 3)


def test_proposals_are_sorted_clipped_and_limited() -> None:
    rpn = network(pre_nms_test=40, post_nms_test=20, pre_nms_train=60, post_nms_train=50)
    outputs = rpn(features(), IMAGE)
    for training, limit in ((False, 20), (True, 50)):
        for found, (height, width) in zip(rpn.propose(outputs, sizes(), training=training), sizes(), strict=True):
            assert 5 < len(found) <= limit
            assert (found.scores.diff() <= 0).all() and not found.labels.any()
            assert (found.boxes >= 0).all()
            assert (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all()
            assert ((found.boxes[:, 2:] - found.boxes[:, :2]) >= rpn.min_size).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_wild_outputs_never_crash(value: float) -> None:
    rpn = network()
    outputs = rpn(features(), IMAGE)
    deltas, objectness = outputs.deltas.detach().clone(), outputs.objectness.detach().clone()
    deltas[0, ::3, 0] = value
    deltas[1, :, 3] = value
    objectness[0, ::5] = value
    for found in rpn.propose(RPNOutputs(objectness, deltas, outputs.lattice), sizes(), training=True):
        assert found.boxes.isfinite().all() and found.scores.isfinite().all()
    assert len(found) == 0 or not math.isnan(value)


def truth(crowd: bool = False) -> list[Target]:
    boxes = torch.tensor([[10.0, 10, 42, 42], [50, 5, 90, 60]])
    crowds = torch.tensor([False, crowd])
    return [
        Target(boxes=boxes, labels=torch.zeros(2, dtype=torch.int64), iscrowd=crowds),
        Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]


def test_samples_follow_the_rule() -> None:
    rpn = network(sampler=BalancedSampler(size=10**6, positive_fraction=0.5))
    lattice = rpn(features(), IMAGE).lattice
    samples = rpn.sample(lattice, truth())
    assert (samples.positive < lattice.total).all(), "the second image has no object"
    iou = box_iou(truth()[0].boxes, lattice.boxes)
    best = iou.amax(dim=0)
    positive = (best >= 0.7) | (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
    assert_close(samples.positive, positive.nonzero().flatten())
    expected = ((best < 0.3) & ~positive).nonzero().flatten()
    assert_close(samples.background[samples.background < lattice.total], expected)
    assert (samples.background >= lattice.total).sum() == lattice.total
    assert_close(samples.boxes, truth()[0].boxes[iou[:, samples.positive].argmax(dim=0)])


def test_anchors_in_a_crowd_teach_nothing() -> None:
    rpn = network(sampler=BalancedSampler(size=10**6, positive_fraction=0.5))
    lattice = rpn(features(), IMAGE).lattice
    samples = rpn.sample(lattice, truth(crowd=True))
    used = torch.cat([samples.positive, samples.background])
    used = used[used < lattice.total]
    crowd = truth()[0].boxes[1]
    clipped = torch.minimum(lattice.boxes[:, 2:], crowd[2:]) - torch.maximum(lattice.boxes[:, :2], crowd[:2])
    sides = lattice.boxes[:, 2:] - lattice.boxes[:, :2]
    share = clipped.clamp(min=0).prod(dim=1) / sides.prod(dim=1)
    assert (share >= 0.7).any() and (share[used] < 0.7).all()
    assert (box_iou(lattice.boxes[samples.positive], crowd[None]) < 0.7).all()


def test_loss_by_hand() -> None:
    rpn = network()
    lattice = rpn(features(), IMAGE).lattice
    samples = rpn.sample(lattice, truth())
    outputs = RPNOutputs(torch.zeros(2, lattice.total), torch.zeros(2, lattice.total, 4), lattice)
    losses = rpn.loss(outputs, samples)
    assert_close(losses["loss_objectness"], torch.tensor(math.log(2)))
    size = rpn.coder.encode(samples.boxes, lattice.boxes[samples.positive]).abs()
    expected = torch.where(size < 1 / 9, size**2 * 4.5, size - 1 / 18).sum()
    assert_close(losses["loss_rpn_box"], expected / (len(samples.positive) + len(samples.background)))


def test_no_objects_at_all_is_a_finite_loss_with_gradients() -> None:
    rpn = network()
    outputs = rpn(features(), IMAGE)
    losses = rpn.loss(outputs, rpn.sample(outputs.lattice, [truth()[1]] * 2))
    assert losses["loss_rpn_box"] == 0 and losses["loss_objectness"] > 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in rpn.parameters())


def test_levels_must_agree_in_anchors() -> None:
    anchors = AnchorGenerator(sizes=[[16], [32, 40]], ratios=[[1.0]])
    with pytest.raises(ValueError, match=r"\[1, 2\] anchors per cell"):
        RegionProposalNetwork(channels=8, anchors=anchors)
