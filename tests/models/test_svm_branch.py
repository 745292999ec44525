from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models.box_branch import TwoLayerHead
from detseg.models.region_features import RegionPool, stack_regions
from detseg.models.region_svms import RegionExamples
from detseg.models.svm_branch import SVMBranch
from detseg.models.warped_crop import WarpedCrop
from detseg.nn import TinyBackbone
from detseg.nn.region_network import BackboneNetwork
from detseg.ops.boxes import box_iou, clip_boxes
from detseg.structures import Target
from detseg.targets.coders import BoxCoder
from detseg.targets.hard_negatives import HardNegativeSVM

SIZES = torch.tensor([[40, 60], [40, 60]])
STRIDES = [1]


def network() -> partial[BackboneNetwork]:
    return partial(BackboneNetwork, backbone=TinyBackbone(widths=(8, 12), stem=6), output_size=2, widths=[10])


def branch(**options: object) -> SVMBranch:
    torch.manual_seed(0)
    parts: dict[str, object] = {
        "pooling": WarpedCrop(output_size=16, context=1.0),
        "head": network(),
        "svm": HardNegativeSVM(cost=1.0, tolerance=1e-4),
        "score_threshold": 0.0,
    }
    return SVMBranch(num_classes=3, channels=3, **(parts | options)).eval()  # type: ignore[arg-type]


def truth() -> list[Target]:
    boxes = [torch.tensor([[4.0, 4, 20, 24], [30, 10, 50, 30]]), torch.tensor([[10.0, 2, 30, 30]])]
    return [Target(boxes=boxes[0], labels=torch.tensor([0, 2])), Target(boxes=boxes[1], labels=torch.tensor([0]))]


def proposals(count: int = 40) -> list[Tensor]:
    """Boxes by chance, and for each object three that are near it."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for target in truth():
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([40.0, 25.0])
        side = torch.rand(count, 2, generator=generator) * 14 + 5
        moved = torch.randn(3, len(target), 4, generator=generator) + target.boxes
        found.append(torch.cat([torch.cat([corner, corner + side], dim=1), moved.flatten(0, 1).clamp(min=0)]))
    return found


def images() -> Tensor:
    return torch.randn(2, 3, 40, 60, generator=torch.Generator().manual_seed(2))


def examples(box: SVMBranch) -> list[RegionExamples]:
    pairs = zip(proposals(), truth(), strict=True)
    return [box.examples([images()], index, boxes, target, STRIDES) for index, (boxes, target) in enumerate(pairs)]


def fitted(**options: object) -> tuple[SVMBranch, list[RegionExamples]]:
    box = branch(**options)
    found = examples(box)
    assert box.fit_svms(lambda: found) == [2, 0, 1]
    assert box.fit_ridge(lambda: found)[1] == 0
    return box, found


@torch.no_grad()
def test_until_it_is_fitted_the_softmax_scores_and_boxes_stay() -> None:
    box = branch(nms=lambda boxes, scores, labels: (scores.argsort(descending=True), scores.sort(descending=True)[0]))
    boxes = proposals()
    found = box.find([images()], boxes, STRIDES, SIZES)
    logits, deltas = box([images()], boxes, STRIDES)
    assert not deltas.any() and deltas.shape == (len(logits), 4, 4)
    scores = logits.softmax(1)[: len(boxes[0]), 1:]
    best = scores.flatten().argsort(descending=True)[:100]
    assert_close(found[0].scores, scores.flatten()[best])
    assert_close(found[0].boxes, clip_boxes(boxes[0], SIZES[0])[best // 3])


@torch.no_grad()
def test_examples_by_hand() -> None:
    """Objects are positives; a proposal below IoU 0.3 with each object of a class is a negative of that class."""
    box, boxes, targets = branch(), proposals(), truth()
    for index, found in enumerate(examples(box)):
        iou = box_iou(targets[index].boxes, boxes[index])
        expected = torch.ones(len(boxes[index]), 3, dtype=torch.bool)
        for row in range(len(boxes[index])):
            for column, label in enumerate(targets[index].labels.tolist()):
                if iou[column, row] >= 0.3:
                    expected[row, label] = False
        kept = expected.any(1)
        assert_close(found.negative, expected[kept])
        maps, vectors = box.describe([images()[index : index + 1]], stack_regions([boxes[index]]), STRIDES)
        assert_close(found.regions.float(), vectors[kept], rtol=1e-3, atol=1e-3)
        of_truth = box.describe([images()[index : index + 1]], stack_regions([targets[index].boxes]), STRIDES)
        assert_close(found.positives.float(), of_truth[1], rtol=1e-3, atol=1e-3)
        assert_close(found.labels, targets[index].labels)
        near = iou.amax(0) >= 0.6
        assert 0 < int(near.sum()) < len(near)
        assert_close(found.maps.float(), maps[near], rtol=1e-3, atol=1e-3)
        moved = box.coder.decode(found.deltas, boxes[index][near])
        assert_close(moved, targets[index].boxes[iou[:, near].argmax(0)], rtol=1e-4, atol=1e-4)
        assert_close(found.map_labels, targets[index].labels[iou[:, near].argmax(0)])
        both = torch.cat([vectors, of_truth[1]]).norm(dim=1).sum(), torch.cat([maps, of_truth[0]]).norm(dim=1).sum()
        assert_close(found.lengths.float(), torch.stack([*both, torch.tensor(float(len(iou[0]) + len(iou)))]))


@torch.no_grad()
@pytest.mark.parametrize("features", ["fc7", "pool5"])
def test_svms_score_by_margins_of_scaled_features(features: str) -> None:
    box, found = fitted(features=features)
    lengths = sum(image.lengths for image in found)
    scale = 20 / float(lengths[0] / lengths[2])
    positives = torch.cat([image.positives[image.labels == 0] for image in found]).float() * scale
    expected = HardNegativeSVM(cost=1.0, tolerance=1e-4).fit(
        [positives, positives[:0], positives[:1]],
        lambda: [(image.regions.float() * scale, image.negative) for image in found],
    )
    maps, vectors = box.describe([images()], stack_regions(proposals()), STRIDES)
    seen = vectors if features == "fc7" else maps
    scores, _ = box.judge(maps, vectors)
    assert_close(scores[:, 0], (seen * scale @ expected.weight[0] + expected.bias[0]).sigmoid(), rtol=0.02, atol=5e-3)
    of_truth = box.describe([images()], stack_regions([target.boxes for target in truth()]), STRIDES)
    own = box.judge(*of_truth)[0]  # (3, K), of the objects, whose classes are 0, 2 and 0
    assert (own[[0, 2], 0] > 0.5).all() and own[1, 2] > own[[0, 2], 2].max()


@torch.no_grad()
def test_a_class_without_objects_is_never_predicted() -> None:
    box, _ = fitted()
    assert box.svms.known.tolist() == [True, False, True]
    found = box.find([images()], proposals(), STRIDES, SIZES)
    assert all(len(one) > 0 and set(one.labels.tolist()) <= {0, 2} for one in found)


@torch.no_grad()
def test_regression_moves_boxes_of_near_proposals_onto_objects() -> None:
    box, _ = fitted(ridge_strength=1e-3)
    target, boxes = truth()[1], proposals()[1]
    near = box_iou(target.boxes, boxes)[0] >= 0.6
    maps, vectors = box.describe([images()[1:]], stack_regions([boxes[near]]), STRIDES)
    deltas = box.judge(maps, vectors)[1]
    assert not deltas[:, 0].any() and not deltas[:, 2].any(), "background, and a class that learnt nothing"
    moved = box.coder.decode(deltas[:, 1], boxes[near])
    before, after = box_iou(target.boxes, boxes[near]).mean(), box_iou(target.boxes, moved).mean()
    assert after > 0.97 > before


@torch.no_grad()
def test_weights_of_the_coder_change_no_box() -> None:
    plain, weighted = fitted()[0], fitted(coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)))[0]
    one, two = (box.find([images()], proposals(), STRIDES, SIZES) for box in (plain, weighted))
    assert_close(one[0].boxes, two[0].boxes, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("classifier", "regression"), [("softmax", True), ("svm", False), ("softmax", False)])
def test_ablations(classifier: str, regression: bool) -> None:
    whole, _ = fitted()
    part = branch(classifier=classifier, box_regression=regression)
    part.load_state_dict(whole.state_dict())
    assert part.stages == ["svm"] * (classifier == "svm") + ["ridge"] * regression and whole.stages == ["svm", "ridge"]
    maps, vectors = whole.describe([images()], stack_regions(proposals()), STRIDES)
    scores, deltas = part.judge(maps, vectors)
    expected = whole.judge(maps, vectors)
    softmax = part.predictor(vectors)[0].softmax(1)[:, 1:]
    assert_close(scores, expected[0] if classifier == "svm" else softmax)
    assert_close(deltas, expected[1] if regression else torch.zeros_like(expected[1]))
    needed = examples(part)[0]
    assert (len(needed.regions) > 0) == (classifier == "svm") and (len(needed.maps) > 0) == regression


@torch.no_grad()
def test_chunks_change_nothing_and_what_was_fitted_can_be_forgotten() -> None:
    whole, _ = fitted(chunk=None)
    small = branch(chunk=7)
    small.load_state_dict(whole.state_dict())
    one, two = (box.find([images()], proposals(), STRIDES, SIZES) for box in (whole, small))
    assert_close(one[1].scores, two[1].scores)
    assert_close(one[1].boxes, two[1].boxes, rtol=1e-4, atol=1e-4)
    assert_close(examples(small)[0].regions, examples(whole)[0].regions, rtol=1e-3, atol=1e-3)
    whole.forget()
    fresh = branch().find([images()], proposals(), STRIDES, SIZES)
    assert_close(whole.find([images()], proposals(), STRIDES, SIZES)[0].scores, fresh[0].scores)


@torch.no_grad()
def test_half_precision_is_left_outside() -> None:
    box, _ = fitted()
    maps, vectors = box.describe([images()], stack_regions(proposals()), STRIDES)
    expected = box.svms(vectors), box.ridge(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close((box.svms(vectors), box.ridge(maps)), expected, rtol=0, atol=0)
    box.svms.bfloat16(), box.ridge.bfloat16()
    assert_close(box.svms(vectors.bfloat16()), expected[0], rtol=0.05, atol=0.05)
    assert_close(box.ridge(maps.bfloat16()), expected[1], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_any_head_and_pooling_will_do() -> None:
    """As in SPP-net: features of a shared map, whose flattened cells are ``pool5``."""
    pooling, head = RegionPool(output_size=2, levels=1), partial(TwoLayerHead, width=9)
    box, _ = fitted(pooling=pooling, head=head, features="pool5")
    assert box.svms.weight.shape == (3, 12) and box.ridge.weight.shape == (3, 12, 4)
    maps, vectors = box.describe([images()], stack_regions(proposals()), STRIDES)
    pooled = pooling([images()], stack_regions(proposals()), STRIDES)
    assert_close(maps, pooled.flatten(1))
    assert_close(vectors, box.head(pooled))


@torch.no_grad()
def test_nothing_proposed_nothing_true_and_crowds() -> None:
    box = branch()
    nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    boxes = proposals()[0]
    empty = box.examples([images()], 0, boxes[:0], nothing, STRIDES)
    assert len(empty.positives) == len(empty.regions) == len(empty.maps) == 0 and float(empty.lengths[2]) == 0
    background = box.examples([images()], 0, boxes, nothing, STRIDES)
    assert background.negative.all() and len(background.regions) == len(boxes)
    target = truth()[0]
    target.iscrowd = torch.tensor([True, False])
    crowded = box.examples([images()], 0, boxes, target, STRIDES)
    inside = box_iou(target.boxes[:1], boxes)[0] > 0.75
    assert crowded.labels.tolist() == [2] and len(crowded.regions) <= len(boxes) - int(inside.sum())
    found = box.find([images()], [boxes[:0], boxes[:0]], STRIDES, SIZES)
    assert [len(one) for one in found] == [0, 0]
    with pytest.raises(ValueError, match="not one object"):
        box.fit_svms(lambda: [background])
    with pytest.raises(ValueError, match=r"no proposal has IoU 0\.6"):
        box.fit_ridge(lambda: [background])


def test_learns_by_the_softmax_alone() -> None:
    box = branch().train()
    outputs = box.learn([images()], proposals(), truth(), STRIDES, SIZES)
    losses = box.losses(outputs)
    logits, labels = outputs[0].class_logits, torch.cat(outputs[0].samples.labels)
    assert set(losses) == {"loss_classifier"}
    assert_close(losses["loss_classifier"], torch.nn.functional.cross_entropy(logits, labels))
    losses["loss_classifier"].backward()
    assert [name for name, value in box.named_parameters() if value.grad is None] == []


def test_words_and_numbers_that_mean_nothing_are_refused() -> None:
    wrong: Sequence[tuple[dict[str, object], str]] = [
        ({"classifier": "tree"}, "classifier='tree'"),
        ({"features": "fc6"}, "features='fc6'"),
        ({"ridge_strength": 0.0}, "ridge_strength=0"),
        ({"ridge_iou": 1.5}, r"ridge_iou=1\.5"),
    ]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            branch(**options)
