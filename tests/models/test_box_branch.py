import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models.box_branch import BoxBranch, RegionSamples, TwoLayerHead
from detseg.models.region_features import RegionAlign
from detseg.structures import Target
from detseg.targets.samplers import BalancedSampler


def branch(**options: object) -> BoxBranch:
    pooling = RegionAlign(output_size=3, levels=1)
    head = partial(TwoLayerHead, width=8)
    return BoxBranch(num_classes=2, channels=4, head=head, pooling=pooling, **options)  # type: ignore[arg-type]


def target(crowd: bool = False) -> Target:
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    return Target(boxes=boxes, labels=torch.tensor([1, 0]), iscrowd=torch.tensor([False, crowd]))


PROPOSALS = torch.tensor([[0.0, 0, 20, 22], [31, 30, 60, 60], [70, 70, 80, 80], [35, 35, 45, 45]])


def sample_all() -> BalancedSampler:
    return BalancedSampler(size=1000, positive_fraction=0.5)


def test_samples_by_hand() -> None:
    samples = branch(sampler=sample_all()).sample([PROPOSALS], [target()])
    # Four proposals, then the two objects themselves.
    assert samples.labels[0].tolist() == [2, 1, 0, 0, 2, 1]
    assert samples.objects[0][samples.labels[0] > 0].tolist() == [0, 1, 0, 1]
    assert_close(samples.boxes[0], torch.cat([PROPOSALS, target().boxes]))
    assert_close(samples.truth[0][0], target().boxes[0])
    assert_close(samples.truth[0][2], PROPOSALS[2])


def test_crowd_is_neither_object_nor_background() -> None:
    samples = branch(sampler=sample_all()).sample([PROPOSALS], [target(crowd=True)])
    # Proposals 1 and 3 lie in the crowd, and the crowd itself does not join the proposals.
    assert_close(samples.boxes[0], torch.cat([PROPOSALS[[0, 2]], target().boxes[:1]]))
    assert samples.labels[0].tolist() == [2, 0, 2]


def test_sizes_and_share_of_the_samples() -> None:
    many = torch.cat([target().boxes.repeat(50, 1), torch.tensor([[70.0, 70, 80, 80]]).repeat(90, 1)])
    samples = branch(sampler=BalancedSampler(size=40, positive_fraction=0.25)).sample([many], [target()])
    assert len(samples.labels[0]) == 40 and (samples.labels[0] > 0).sum() == 10


def test_image_without_objects_or_proposals() -> None:
    box = branch()
    empty = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    samples = box.sample([torch.zeros(0, 4), PROPOSALS], [empty, empty])
    assert [len(labels) for labels in samples.labels] == [0, 4] and not samples.labels[1].any()
    nothing = box.sample([torch.zeros(0, 4)], [empty])
    logits, deltas = box([torch.randn(1, 4, 16, 16)], nothing.boxes, [8])
    losses = box.loss(logits, deltas, nothing)
    assert losses["loss_classifier"] == 0 and losses["loss_box"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in box.parameters())


def test_truth_without_area_gives_no_nan() -> None:
    flat = Target(boxes=torch.tensor([[5.0, 5, 5, 20]]), labels=torch.tensor([0]))
    box = branch()
    samples = box.sample([PROPOSALS], [flat])
    assert not samples.labels[0].any()
    logits, deltas = box([torch.randn(1, 4, 16, 16)], samples.boxes, [8])
    assert all(value.isfinite() for value in box.loss(logits, deltas, samples).values())


def test_loss_by_hand() -> None:
    region = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    wanted = torch.tensor([[1.0, 0, 11, 10], [50, 50, 60, 60]])  # moved by a tenth of its width: dx = 10 * 0.1
    samples = RegionSamples([region], [torch.tensor([2, 0])], [torch.tensor([0, 0])], [wanted])
    losses = branch().loss(torch.zeros(2, 3), torch.zeros(2, 3, 4), samples)
    assert_close(losses["loss_classifier"], torch.tensor(math.log(3)))
    assert_close(losses["loss_box"], torch.tensor((1 - 1 / 18) / 2))


def scores(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_detections_by_hand() -> None:
    box = branch(score_threshold=0.2, detections_per_image=2)
    proposals = torch.tensor([[0.0, 0, 20, 20], [1, 0, 20, 20], [40, 40, 90, 90], [10, 50, 30, 70]])
    logits = scores([0.1, 0.6, 0.3], [0.1, 0.85, 0.05], [0.5, 0.1, 0.4], [0.9, 0.05, 0.05])
    deltas = torch.zeros(4, 3, 4)
    (found,) = box.detect(logits, deltas, [proposals], torch.tensor([[80, 80]]))
    assert found.labels.tolist() == [0, 1]
    assert_close(found.scores, torch.tensor([0.85, 0.4]))
    assert_close(found.boxes, torch.tensor([[1.0, 0, 20, 20], [40, 40, 80, 80]]))


def test_class_wise_deltas_move_the_class_they_belong_to() -> None:
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 2, 0] = 10.0  # class 1 moves by a whole width; 10 is the coder's weight
    (found,) = branch().detect(
        scores([0.2, 0.4, 0.4]), deltas, [torch.tensor([[0.0, 0, 20, 20]])], torch.tensor([[80, 80]])
    )
    assert_close(found[found.labels == 0].boxes, torch.tensor([[0.0, 0, 20, 20]]))
    assert_close(found[found.labels == 1].boxes, torch.tensor([[20.0, 0, 40, 20]]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_wild_outputs_are_no_detections(value: float) -> None:
    logits, deltas = torch.zeros(4, 3), torch.full((4, 3, 4), value)
    (found,) = branch().detect(logits, deltas, [PROPOSALS], torch.tensor([[80, 80]]))
    assert found.boxes.isfinite().all() and (found.boxes <= 80).all()
    (none,) = branch().detect(torch.full((4, 3), math.nan), deltas, [PROPOSALS], torch.tensor([[80, 80]]))
    assert len(none) == 0


def test_one_box_for_all_classes() -> None:
    agnostic = branch(class_agnostic=True, nms=None, score_threshold=0.1)
    features = [torch.rand(1, 4, 20, 20)]
    logits, deltas = agnostic(features, [PROPOSALS], [4])
    assert logits.shape == (4, 3) and deltas.shape == (4, 1, 4)
    logits = torch.tensor([[0.0, 5.0, 5.0]] * 4)  # both classes: 0.4983 each
    deltas = torch.zeros(4, 1, 4)
    deltas[1, 0, 0] = 10.0  # moves by its width, 29 pixels, whatever the class
    (found,) = agnostic.detect(logits, deltas, [PROPOSALS], torch.tensor([[100, 100]]))
    assert_close(found.boxes[found.labels == 0], found.boxes[found.labels == 1])
    assert [60.0, 30.0, 89.0, 60.0] in found.boxes.tolist()
    samples = RegionSamples(
        boxes=[PROPOSALS[:2]],
        labels=[torch.tensor([2, 0])],
        objects=[torch.zeros(2, dtype=torch.int64)],
        truth=[PROPOSALS[:2] + torch.tensor([2.0, 0, 2, 0])],
    )
    loss = agnostic.loss(torch.zeros(2, 3), torch.zeros(2, 1, 4), samples)["loss_box"]
    # dx = 10 * 2 / 20 = 1, of the positive alone; smooth L1 with beta 1/9: 1 - 1/18, over two regions
    assert_close(loss, torch.tensor((1 - 1 / 18) / 2))


@torch.no_grad()
def test_regions_in_chunks_give_the_same() -> None:
    whole = branch()
    features, boxes = [torch.rand(2, 4, 20, 20)], [PROPOSALS, PROPOSALS[:3]]
    expected = whole(features, boxes, [4])
    whole.chunk = 3
    for ours, theirs in zip(whole(features, boxes, [4]), expected, strict=True):
        assert_close(ours, theirs)
    nothing = whole(features, [PROPOSALS[:0], PROPOSALS[:0]], [4])
    assert nothing[0].shape == (0, 3) and nothing[1].shape == (0, 3, 4)
