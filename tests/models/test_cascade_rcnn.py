import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models import CascadeRCNN
from detseg.models.box_branch import BoxBranch, TwoLayerHead
from detseg.models.cascade_rcnn import CascadeBranch, CascadeStage, published_stages, refine
from detseg.models.mask_branch import MaskBranch
from detseg.models.region_features import RegionAlign
from detseg.models.rpn import RegionProposalNetwork
from detseg.nn import BackboneWithFPN, CheckpointMismatch, TinyBackbone, TorchvisionBackbone
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator
from detseg.targets.coders import BoxCoder
from detseg.targets.matchers import IoUMatcher
from detseg.targets.samplers import BalancedSampler
from models.two_stage_oracle import pair

SIZES = torch.tensor([[100, 100]])
FEATURES = [torch.rand(1, 4, 25, 25, generator=torch.Generator().manual_seed(5))]
PROPOSALS = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [50, 50, 90, 90]])


def stage(iou: float = 0.5, unit: float = 10.0, weight: float = 1.0) -> CascadeStage:
    matcher = IoUMatcher(positive=iou, negative=iou, allow_low_quality=False)
    return CascadeStage(matcher=matcher, coder=BoxCoder(weights=[unit, unit, unit / 2, unit / 2]), weight=weight)


def branch(count: int = 3, **options: object) -> CascadeBranch:
    parts: dict[str, object] = {
        "class_agnostic": True,
        "pooling": RegionAlign(output_size=3, levels=1),
        "head": partial(TwoLayerHead, width=8),
        "sampler": BalancedSampler(size=1000, positive_fraction=1.0),
    }
    box = partial(BoxBranch, **(parts | options))  # type: ignore[arg-type]
    stages = {str(number): stage(0.5 + 0.1 * number, 10.0 * (number + 1)) for number in range(count)}
    return CascadeBranch(num_classes=2, channels=4, box=box, stages=stages)


@torch.no_grad()
def says(one: BoxBranch, probabilities: Sequence[float], delta: Sequence[float]) -> None:
    """Make a stage give the same class probabilities and deltas to every region."""
    for layer in (one.predictor.cls_score, one.predictor.bbox_pred):
        layer.weight.zero_()
    one.predictor.cls_score.bias.copy_(torch.tensor(probabilities).log())
    one.predictor.bbox_pred.bias.copy_(torch.tensor(delta))


def target() -> Target:
    return Target(boxes=torch.tensor([[2.0, 0, 22, 20], [33, 30, 63, 60]]), labels=torch.tensor([1, 0]))


def test_the_papers_stages() -> None:
    stages = list(published_stages().values())
    assert [one.matcher.positive for one in stages] == [0.5, 0.6, 0.7]
    assert [one.coder.weights[0] for one in stages] == [10, 20, 30]
    assert [one.coder.weights[3] for one in stages] == [5, 10, 15]
    cascade = CascadeBranch(num_classes=2, channels=4)
    assert len(cascade.stages) == 3 and cascade.weights == [1.0, 0.5, 0.25]
    assert all(one.predictor.bbox_pred.out_features == 4 for one in cascade.stages)
    first, second = cascade.stages[0].head.fc6.weight, cascade.stages[1].head.fc6.weight
    assert first is not second and not first.equal(second)  # heads of their own


def test_refined_boxes_by_hand() -> None:
    cascade = branch(2)
    boxes = [torch.tensor([[0.0, 0, 20, 20], [80, 80, 100, 100]]), torch.tensor([[10.0, 10, 30, 50]])]
    sizes = torch.tensor([[100, 95], [100, 100]])
    # The second stage's units are 1/20 of a width: 2 moves by a tenth, 10 * log(2) doubles the height.
    delta = torch.tensor([[2.0, 0, 0, 0]] * 2 + [[0, 0, 0, 10 * math.log(2)]])[:, None]
    moved = refine(cascade.stages[1], delta, boxes, sizes)
    assert_close(moved[0], torch.tensor([[2.0, 0, 22, 20], [82, 80, 95, 100]]))
    assert_close(moved[1], torch.tensor([[10.0, 0, 30, 70]]))
    delta[0] = math.nan
    assert_close(refine(cascade.stages[1], delta, boxes, sizes)[0][0], boxes[0][0])


def test_a_stage_learns_from_what_the_one_before_refined() -> None:
    cascade = branch(3)
    says(cascade.stages[0], [0.2, 0.4, 0.4], [1.0, 0, 0, 0])  # every region moves by a tenth of its width
    says(cascade.stages[1], [0.2, 0.4, 0.4], [0.0, 0, 0, 0])
    first, second, third = cascade.learn(FEATURES, [PROPOSALS], [target()], [4], SIZES)
    truth = target().boxes
    assert_close(first.samples.boxes[0], torch.cat([PROPOSALS, truth]))
    assert first.samples.labels[0].tolist() == [2, 1, 0, 2, 1]
    moved = torch.tensor([[2.0, 0, 22, 20], [33, 30, 63, 60], [54, 50, 94, 90], [4, 0, 24, 20], [36, 30, 66, 60]])
    assert_close(second.samples.boxes[0], torch.cat([moved, truth]))
    # the truth that moved on by a tenth still has an IoU of 18 / 22 and 27 / 33
    assert second.samples.labels[0].tolist() == [2, 1, 0, 2, 1, 2, 1]
    assert_close(third.samples.boxes[0], torch.cat([moved, truth, truth]))
    assert_close(third.samples.truth[0][:2], truth)


def test_a_later_stage_asks_for_a_higher_iou() -> None:
    cascade = branch(3)
    for one in cascade.stages:
        says(one, [0.2, 0.4, 0.4], [0.0, 0, 0, 0])
    near = torch.tensor(
        [[5.0, 0, 25, 20], [7.0, 0, 27, 20]]
    )  # IoU 17 / 23 = 0.74 and 15 / 25 = 0.6 - with the first object
    near = torch.cat([near, torch.tensor([[7.5, 0, 27.5, 20]])])  # 14.5 / 25.5 = 0.57
    labels = [made.samples.labels[0][:3].tolist() for made in cascade.learn(FEATURES, [near], [target()], [4], SIZES)]
    assert labels == [[2, 2, 2], [2, 2, 0], [2, 0, 0]]


def test_degenerate_boxes_do_not_go_on() -> None:
    cascade = branch(2)
    says(cascade.stages[0], [0.2, 0.4, 0.4], [100.0, 0, 0, 0])  # ten widths to the right: out of the image
    first, second = cascade.learn(FEATURES, [PROPOSALS], [target()], [4], SIZES)
    assert len(first.samples.boxes[0]) == 5
    assert_close(second.samples.boxes[0], target().boxes)


def test_losses_are_named_and_weighed_per_stage() -> None:
    cascade = branch(2)
    cascade.weights = [1.0, 0.25]
    outputs = cascade.learn(FEATURES, [PROPOSALS], [target()], [4], SIZES)
    losses = cascade.losses(outputs)
    assert list(losses) == ["loss_classifier_1", "loss_box_1", "loss_classifier_2", "loss_box_2"]
    own = [one.losses([made]) for one, made in zip(cascade.stages, outputs, strict=True)]
    assert_close(losses["loss_box_1"], own[0]["loss_box"])
    assert_close(losses["loss_classifier_2"], own[1]["loss_classifier"] / 4)
    assert_close(losses["loss_box_2"], own[1]["loss_box"] / 4)
    assert all(value > 0 for value in losses.values())


@torch.no_grad()
def test_one_stage_is_a_box_branch() -> None:
    cascade = branch(1, score_threshold=0.01)
    (alone,) = cascade.stages
    (made,) = cascade.learn(FEATURES, [PROPOSALS], [target()], [4], SIZES)
    (expected,) = alone.learn(FEATURES, [PROPOSALS], [target()], [4], SIZES)
    assert_close(made.class_logits, expected.class_logits, rtol=0, atol=0)
    assert_close(cascade.losses([made])["loss_box_1"], alone.losses([expected])["loss_box"], rtol=0, atol=0)
    (found,) = cascade.find(FEATURES, [PROPOSALS], [4], SIZES)
    (other,) = alone.find(FEATURES, [PROPOSALS], [4], SIZES)
    assert len(found) == 6
    assert_close(found.boxes, other.boxes)
    assert_close(found.scores, other.scores)
    assert_close(found.labels, other.labels)


def test_boxes_in_sequence_and_mean_probabilities_by_hand() -> None:
    cascade = branch(3, score_threshold=0.25)
    says(cascade.stages[0], [0.1, 0.9, 1e-9], [1.0, 0, 0, 0])  # a tenth to the right
    says(cascade.stages[1], [0.6, 0.2, 0.2], [0.0, 4.0, 0, 0])  # two tenths down
    says(cascade.stages[2], [0.7, 0.1, 0.2], [0.0, 0, 15 * math.log(2), 0])  # twice as wide
    proposal = torch.tensor([[20.0, 20, 40, 40]])
    (found,) = cascade.find(FEATURES, [proposal], [4], SIZES)
    assert found.labels.tolist() == [0]  # class 1 has (0 + 0.2 + 0.2) / 3, below the threshold
    assert_close(found.scores, torch.tensor([(0.9 + 0.2 + 0.1) / 3]))
    assert_close(found.boxes, torch.tensor([[12.0, 24, 52, 44]]))


@torch.no_grad()
def test_wild_outputs_and_no_proposals_give_no_detections() -> None:
    cascade = branch(3)
    assert [len(found) for found in cascade.find(FEATURES, [PROPOSALS[:0]], [4], SIZES)] == [0]
    for value in (math.nan, math.inf, -math.inf):
        says(cascade.stages[0], [0.1, 0.8, 0.1], [value] * 4)
        (found,) = cascade.find(FEATURES, [PROPOSALS], [4], SIZES)
        assert found.boxes.isfinite().all() and (found.boxes <= 100).all()
    says(cascade.stages[1], [math.nan] * 3, [0.0] * 4)
    assert len(cascade.find(FEATURES, [PROPOSALS], [4], SIZES)[0]) == 0


def test_stages_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="one per class; set class_agnostic to true"):
        branch(2, class_agnostic=False)
    with pytest.raises(ValueError, match="all of the stages first, second are left out"):
        CascadeBranch(num_classes=2, channels=4, stages={"first": None, "second": None})
    two = CascadeBranch(num_classes=2, channels=4, stages=published_stages() | {"third": None})
    assert len(two.stages) == 2


def model(**options: object) -> CascadeRCNN:
    anchors = AnchorGenerator(sizes=[[12], [24]], ratios=[[0.5, 1.0, 2.0]])
    pooling = partial(RegionAlign, levels=2, canonical_size=64.0)
    head = partial(TwoLayerHead, width=16)
    parts: dict[str, object] = {
        "rpn": partial(RegionProposalNetwork, anchors=anchors, post_nms_test=50, pre_nms_test=100),
        "box": partial(BoxBranch, class_agnostic=True, head=head, pooling=pooling(output_size=3), score_threshold=0.01),
        "mask": partial(MaskBranch, widths=[8], pooling=pooling(output_size=4)),
    }
    backbone = BackboneWithFPN(backbone=TinyBackbone(widths=(8, 12), stem=6), channels=8)
    return CascadeRCNN(num_classes=3, backbone=backbone, **(parts | options))  # type: ignore[arg-type]


def batch(empty: bool = False) -> tuple[Tensor, Tensor, list[Target]]:
    images, sizes = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [50, 60]])
    count = 0 if empty else 2
    boxes = torch.tensor([[5.0, 5, 25, 30], [30, 20, 48, 45]])[:count]
    targets = [
        Target(boxes=boxes, labels=torch.tensor([0, 2])[:count], masks=torch.ones(count, *size, dtype=torch.bool))
        for size in sizes.tolist()
    ]
    return images, sizes, targets


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_receives_a_gradient(masks: bool, empty: bool) -> None:
    detector = model() if masks else model(mask=None)
    images, sizes, targets = batch(empty)
    losses = detector.loss(detector(images, sizes, targets), targets)
    assert len(losses) == 8 + masks and all(value.isfinite() for value in losses.values())
    zero = {name for name, value in losses.items() if value == 0}
    nothing = {"loss_rpn_box", "loss_box_1", "loss_box_2", "loss_box_3"} | ({"loss_mask"} if masks else set())
    assert zero == (nothing if empty else set())
    sum(losses.values()).backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_masks_are_learnt_in_the_last_stages_regions_and_drawn_in_its_boxes() -> None:
    detector = model().eval()
    images, sizes, targets = batch()
    outputs = detector(images, sizes, targets)
    assert outputs.regions is not None and len(outputs.regions) == 3
    assert outputs.samples is outputs.regions[2].samples
    assert len(outputs.mask_logits) == sum(int((labels > 0).sum()) for labels in outputs.samples.labels)
    blind = detector.predict(detector(images, sizes), sizes)
    for one, two in zip(detector.predict(outputs, sizes), blind, strict=True):
        assert len(one) > 0 and one.masks is not None
        assert_close(one.boxes, two.boxes)
        assert_close(one.masks, two.masks)
    assert detector.diagnostics(outputs, targets)["foreground_share"] > 0


def test_of_published_weights_the_backbone_and_the_proposals_are_taken(tmp_path: Path) -> None:
    theirs, ours = pair("faster")
    path = tmp_path / "fasterrcnn.pth"
    torch.save(theirs.state_dict(), path)

    def build(**options: object) -> CascadeRCNN:
        torch.manual_seed(3)
        body = BackboneWithFPN(backbone=TorchvisionBackbone(name="resnet18", frozen_norm=True), extra="pool")
        return CascadeRCNN(num_classes=7, backbone=body, **options)  # type: ignore[arg-type]

    filled, new = build(weights=path).state_dict(), build().state_dict()
    assert_close(filled["rpn.head.bbox_pred.weight"], ours.state_dict()["rpn.head.bbox_pred.weight"])
    assert_close(
        filled["backbone.fpn.layer_blocks.0.0.weight"], ours.state_dict()["backbone.fpn.layer_blocks.0.0.weight"]
    )
    assert_close(filled["box.stages.1.head.fc6.weight"], new["box.stages.1.head.fc6.weight"])
    torch.save({key: value for key, value in theirs.state_dict().items() if "rpn" not in key}, path)
    with pytest.raises(CheckpointMismatch, match=r"keys only in the model: rpn\.head"):
        build(weights=path)
