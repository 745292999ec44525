from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models import FasterRCNN, MaskRCNN
from detseg.models.box_branch import BoxBranch, TwoLayerHead
from detseg.models.mask_branch import MaskBranch
from detseg.models.region_features import RegionAlign
from detseg.models.rpn import RegionProposalNetwork
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import BackboneWithFPN, TinyBackbone
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator


def backbone() -> BackboneWithFPN:
    return BackboneWithFPN(backbone=TinyBackbone(widths=(8, 12), stem=6), channels=8)


def model(kind: type[TwoStageDetector] = MaskRCNN, **options: object) -> TwoStageDetector:
    anchors = AnchorGenerator(sizes=[[12], [24]], ratios=[[0.5, 1.0, 2.0]])
    pooling = RegionAlign(output_size=3, levels=2, canonical_size=64.0)
    parts: dict[str, object] = {
        "rpn": partial(RegionProposalNetwork, anchors=anchors, post_nms_test=50, pre_nms_test=100),
        "box": partial(BoxBranch, head=partial(TwoLayerHead, width=16), pooling=pooling, score_threshold=0.01),
    }
    if kind is MaskRCNN:
        mask_pooling = RegionAlign(output_size=4, levels=2, canonical_size=64.0)
        parts["mask"] = partial(MaskBranch, widths=[8], pooling=mask_pooling)
    return kind(num_classes=3, backbone=backbone(), **(parts | options))  # type: ignore[call-arg]


def batch(empty: bool = False) -> tuple[Tensor, Tensor, list[Target]]:
    images, sizes = torch.rand(2, 3, 64, 64), torch.tensor([[64, 64], [50, 60]])
    count = 0 if empty else 2
    boxes = torch.tensor([[5.0, 5, 25, 30], [30, 20, 48, 45]])[:count]
    targets = [
        Target(boxes=boxes, labels=torch.tensor([0, 2])[:count], masks=torch.ones(count, *size, dtype=torch.bool))
        for size in sizes.tolist()
    ]
    return images, sizes, targets


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN])
@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_receives_a_gradient(kind: type[TwoStageDetector], empty: bool) -> None:
    detector = model(kind)
    images, sizes, targets = batch(empty)
    losses = detector.loss(detector(images, sizes, targets), targets)
    assert all(value.isfinite() for value in losses.values())
    if empty:
        zero = {name for name, value in losses.items() if value == 0}
        assert zero == {"loss_rpn_box", "loss_box"} | ({"loss_mask"} if kind is MaskRCNN else set())
    sum(losses.values()).backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_truth_never_reaches_the_predictions() -> None:
    detector = model().eval()
    images, sizes, targets = batch()
    blind = detector.predict(detector(images, sizes), sizes)
    seeing = detector.predict(detector(images, sizes, targets), sizes)
    assert len(blind[0]) > 0
    for one, two in zip(blind, seeing, strict=True):
        assert_close(one.boxes, two.boxes)
        assert_close(one.scores, two.scores)
        assert one.masks is not None and two.masks is not None
        assert_close(one.masks, two.masks)


@torch.no_grad()
def test_behaviour_does_not_depend_on_the_mode() -> None:
    detector = model()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
            module.eval()
    images, sizes, targets = batch()
    results = []
    for training in (True, False):
        detector.training = detector.rpn.training = detector.box.training = training
        torch.manual_seed(3)
        outputs = detector(images, sizes, targets)
        results.append((detector.loss(outputs, targets), detector.predict(outputs, sizes)))
    for name, value in results[0][0].items():
        assert_close(value, results[1][0][name], rtol=0, atol=0)
    assert_close(results[0][1][0].boxes, results[1][1][0].boxes, rtol=0, atol=0)


@torch.no_grad()
def test_predictions_lie_in_the_valid_image_and_ignore_the_padding() -> None:
    detector = model().eval()
    images, sizes, _ = batch()
    found = detector.predict(detector(images, sizes), sizes)
    images[1, :, 50:] = 7.0
    images[1, :, :, 60:] = -3.0
    again = detector.predict(detector(images, sizes), sizes)
    assert len(found[1]) > 0
    assert (found[1].boxes[:, 3] <= 50).all() and (found[1].boxes[:, 2] <= 60).all()
    assert_close(found[1].boxes, again[1].boxes)
    assert all((detections.scores.diff() <= 0).all() for detections in found)


def test_loss_twice_from_one_forward_is_equal() -> None:
    detector = model()
    images, sizes, targets = batch()
    outputs = detector(images, sizes, targets)
    with torch.no_grad():
        first, second = detector.loss(outputs, targets), detector.loss(outputs, targets)
    assert first == second and len(first) == 5


def test_sizes_may_be_left_out() -> None:
    detector = model(FasterRCNN).eval()
    images = batch()[0]
    whole = torch.tensor([[64, 64], [64, 64]])
    outputs = detector(images)
    assert_close(outputs.sizes, whole)
    assert_close(outputs.rpn.objectness, detector(images, whole).rpn.objectness)


def test_proposals_and_diagnostics() -> None:
    detector = model()
    images, sizes, targets = batch()
    assert detector.diagnostics(detector(images, sizes), targets) == {}
    outputs = detector(images, sizes, targets)
    share = detector.diagnostics(outputs, targets)["foreground_share"]
    labels = torch.cat(outputs.samples.labels)
    assert_close(share, (labels > 0).float().mean())
    assert 0 < share < 0.5
    for proposals in detector.proposals(outputs, sizes):
        assert 0 < len(proposals) <= 50 and not proposals.labels.any()
        assert (proposals.scores.diff() <= 0).all()


def test_loss_without_targets_in_forward_says_what_to_do() -> None:
    detector = model()
    images, sizes, targets = batch()
    with pytest.raises(ValueError, match=r"call model\(images, sizes, targets\)"):
        detector.loss(detector(images, sizes), targets)


def test_labels_and_counts_are_checked_with_numbers() -> None:
    detector = model()
    images, sizes, targets = batch()
    with pytest.raises(ValueError, match="2 images but 1 targets"):
        detector(images, sizes, targets[:1])
    targets[1].labels[0] = 3
    targets[1].image_id = 42
    with pytest.raises(ValueError, match=r"image 42 has label 3, but num_classes is 3; labels are 0\.\.2"):
        detector(images, sizes, targets)


def test_crowds_alone_teach_as_little_as_no_objects() -> None:
    detector = model()
    images, sizes, targets = batch()
    for target in targets:
        target.iscrowd[:] = True
    losses = detector.loss(detector(images, sizes, targets), targets)
    assert losses["loss_box"] == losses["loss_rpn_box"] == losses["loss_mask"] == 0
    assert losses["loss_classifier"] > 0


def test_state_dict_round_trip() -> None:
    first, second = model().eval(), model().eval()
    second.load_state_dict(first.state_dict())
    images, sizes, _ = batch()
    one, two = first.predict(first(images, sizes), sizes), second.predict(second(images, sizes), sizes)
    assert_close(one[0].boxes, two[0].boxes)


class Corners:
    """Proposes the quarters of an image, and the whole."""

    key = "corners"

    def __call__(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8
        h, w = float(image.shape[1]), float(image.shape[2])
        rows = [[0, 0, w, h], [0, 0, w / 2, h / 2], [w / 2, 0, w, h / 2], [0, h / 2, w / 2, h], [w / 2, h / 2, w, h]]
        return torch.tensor(rows)


def proposed(**options: object) -> TwoStageDetector:
    pooling = RegionAlign(output_size=3, levels=2, canonical_size=64.0)
    head = partial(TwoLayerHead, width=16)
    box = BoxBranch(num_classes=3, channels=8, head=head, pooling=pooling, score_threshold=0.01)
    parts: dict[str, object] = {"proposer": Corners(), "box": box}
    return TwoStageDetector(num_classes=3, backbone=backbone(), **(parts | options))  # type: ignore[arg-type]


@torch.no_grad()
def test_proposals_of_a_proposer_are_those_of_the_valid_image() -> None:
    detector = proposed().eval()
    images, sizes, targets = batch()
    outputs = detector(images, sizes)
    assert outputs.given[1].tolist()[0] == [0, 0, 60, 50] and outputs.rpn is None
    found = detector.proposals(outputs, sizes)
    assert_close(found[0].scores, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))
    losses = detector.loss(detector(images, sizes, targets), targets)
    assert set(losses) == {"loss_classifier", "loss_box"}


@torch.no_grad()
def test_proposals_made_before_are_used_and_clipped() -> None:
    detector = proposed().eval()
    images, sizes, _ = batch()
    given = [torch.tensor([[3.0, 4, 30, 31]]), torch.tensor([[10.0, 10, 64, 64]])]
    outputs = detector(images, sizes, proposals=given)
    assert [found.boxes.tolist() for found in detector.proposals(outputs, sizes)] == [
        [[3, 4, 30, 31]],
        [[10, 10, 60, 50]],
    ]
    same = detector.predict(detector(images, sizes, proposals=corners_of(sizes)), sizes)
    for one, two in zip(same, detector.predict(detector(images, sizes), sizes), strict=True):
        assert_close(one.boxes, two.boxes)
        assert_close(one.scores, two.scores)


def corners_of(sizes: Tensor) -> list[Tensor]:
    return [Corners()(torch.zeros(3, h, w, dtype=torch.uint8)) for h, w in sizes.tolist()]


@torch.no_grad()
def test_an_image_without_proposals_has_no_detections_and_others_keep_theirs() -> None:
    detector = proposed().eval()
    images, sizes, targets = batch()
    both = corners_of(sizes)
    found = detector.predict(detector(images, sizes, proposals=[torch.zeros(0, 4), both[1]]), sizes)
    expected = detector.predict(detector(images, sizes, proposals=both), sizes)
    assert len(found[0]) == 0 and len(found[1]) > 0
    assert_close(found[1].scores, expected[1].scores)
    nothing = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert [len(some) for some in detector.predict(detector(images, sizes, proposals=nothing), sizes)] == [0, 0]
    outputs = detector(images, sizes, targets, nothing)
    assert [labels.tolist() for labels in outputs.samples.labels] == [[1, 3], [1, 3]]  # the objects themselves remain
    assert all(value > 0 for value in detector.loss(outputs, targets).values())


def test_proposals_come_from_one_place_and_for_every_image() -> None:
    with pytest.raises(ValueError, match="give either"):
        proposed(proposer=None)
    with pytest.raises(ValueError, match="give either"):
        proposed(rpn=RegionProposalNetwork(channels=8))
    images, sizes, _ = batch()
    with pytest.raises(ValueError, match="2 images but proposals for 1"):
        proposed()(images, sizes, proposals=[torch.zeros(0, 4)])


@pytest.mark.gpu
def test_a_step_and_predictions_on_a_gpu_equal_the_cpus() -> None:
    detector = model().eval()
    images, sizes, targets = batch()
    on_cpu = detector.predict(detector(images, sizes), sizes)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    detector.cuda()
    there = [target.to("cuda") for target in targets]
    losses = detector.loss(detector(images.cuda(), sizes.cuda(), there), there)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    on_gpu = detector.predict(detector(images.cuda(), sizes.cuda()), sizes.cuda())
    for one, two in zip(on_cpu, on_gpu, strict=True):
        assert_close(one.scores, two.scores.cpu(), rtol=1e-3, atol=1e-4)
        assert_close(one.boxes, two.boxes.cpu(), rtol=1e-3, atol=1e-2)
