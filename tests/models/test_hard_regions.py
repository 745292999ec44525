import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from detseg.losses.focal import FocalLoss
from detseg.losses.iou import GIoULoss
from detseg.losses.smooth_l1 import SmoothL1
from detseg.models.box_branch import BoxBranch, RegionSamples, TwoLayerHead
from detseg.models.hard_regions import hard_regions, one_by_one, predicting, region_losses
from detseg.models.region_features import RegionAlign
from detseg.structures import Target
from detseg.targets.samplers import HardSampler

FEATURES = [torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(2))]


def branch(size: int = 2, **options: object) -> BoxBranch:
    parts: dict[str, object] = {
        "pooling": RegionAlign(output_size=3, levels=1),
        "head": partial(TwoLayerHead, width=8),
        "sampler": HardSampler(size=size),
    }
    return BoxBranch(num_classes=2, channels=4, **(parts | options))  # type: ignore[arg-type]


@torch.no_grad()
def says(one: BoxBranch, probabilities: Sequence[float]) -> None:
    """Give every region the same class probabilities, and deltas of 0."""
    for layer in (one.predictor.cls_score, one.predictor.bbox_pred):
        layer.weight.zero_()
        layer.bias.zero_()
    one.predictor.cls_score.bias.copy_(torch.tensor(probabilities).log())


PROPOSALS = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 60, 60], [41, 40, 61, 60], [60, 0, 80, 20]])


def target(crowd: bool = False) -> Target:
    """Class 1 on the first proposal; the second object, perhaps a crowd, lies under the last one."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [50, 0, 80, 30]])
    return Target(boxes=boxes, labels=torch.tensor([1, 0]), iscrowd=torch.tensor([False, crowd]))


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_of_regions_by_hand(agnostic: bool) -> None:
    box = branch(class_agnostic=agnostic, box_loss=SmoothL1(beta=0.0))
    says(box, [0.5, 0.25, 0.25])
    samples = box.sample([PROPOSALS], [target(crowd=True)])
    assert samples.labels[0].tolist() == [2, 2, 0, 0, 2]  # the last proposal lies in the crowd; the truth joins
    losses = region_losses(box, *box(FEATURES, samples.boxes, [4]), samples)
    # background costs log 2, class 1 log 4, and the second region lies a twentieth of its width off: 10 / 20
    assert_close(losses, torch.tensor([math.log(4), math.log(4) + 0.5, math.log(2), math.log(2), math.log(4)]))
    summed = box.loss(*box(FEATURES, samples.boxes, [4]), samples)
    assert_close(losses.sum() / 5, summed["loss_classifier"] + summed["loss_box"])


def test_the_hardest_by_hand_without_their_doubles() -> None:
    box = branch(size=2)
    says(box, [0.5, 0.25, 0.25])
    samples = box.sample([PROPOSALS], [target(crowd=True)])
    (rows,) = hard_regions(box, box.sampler, FEATURES, samples, [4])
    # Row 1 is the hardest; rows 0 and 4 overlap it by 19 / 21; of rows 2 and 3, equally hard, the first one stays.
    assert rows.tolist() == [1, 2]
    (outputs,) = box.learn(FEATURES, [PROPOSALS], [target(crowd=True)], [4], torch.tensor([[80, 80]]))
    assert_close(outputs.samples.boxes[0], PROPOSALS[[1, 2]])
    assert outputs.samples.labels[0].tolist() == [2, 0] and outputs.class_logits.shape == (2, 3)
    assert_close(outputs.samples.truth[0], torch.stack([PROPOSALS[0], PROPOSALS[2]]))
    box.sampler = HardSampler(size=10, threshold=0.95)
    (more,) = box.learn(FEATURES, [PROPOSALS], [target(crowd=True)], [4], torch.tensor([[80, 80]]))
    assert_close(more.samples.boxes[0], PROPOSALS[:4])  # the truth is the first proposal once more


def test_one_that_is_sure_and_right_is_easy() -> None:
    box = branch(size=1)
    says(box, [0.98, 0.01, 0.01])
    (outputs,) = box.learn(FEATURES, [PROPOSALS], [target()], [4], torch.tensor([[80, 80]]))
    assert int(outputs.samples.labels[0]) > 0
    says(box, [0.01, 0.01, 0.98])
    (outputs,) = box.learn(FEATURES, [PROPOSALS], [target()], [4], torch.tensor([[80, 80]]))
    assert int(outputs.samples.labels[0]) != 2


def test_each_image_has_its_own_and_one_without_objects_or_regions_is_fine() -> None:
    box = branch(size=3)
    nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    for proposals, counts in (([PROPOSALS, PROPOSALS], [3, 3]), ([PROPOSALS, PROPOSALS[:0]], [3, 0])):
        (outputs,) = box.learn(FEATURES, proposals, [target(), nothing], [4], torch.tensor([[80, 80]] * 2))
        assert [len(labels) for labels in outputs.samples.labels] == counts
        assert not outputs.samples.labels[1].any()
    (outputs,) = box.learn(FEATURES, [PROPOSALS[:0]] * 2, [nothing, nothing], [4], torch.tensor([[80, 80]] * 2))
    losses = box.losses([outputs])
    assert losses["loss_classifier"] == 0 and losses["loss_box"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in box.parameters())


class Noisy(nn.Module):
    """A head whose dropout and norm behave differently in training."""

    def __init__(self, *, shape: Sequence[int]) -> None:
        super().__init__()
        self.out_features = shape[0]
        self.norm, self.drop = nn.BatchNorm2d(shape[0]), nn.Dropout(0.5)

    def forward(self, regions: Tensor) -> Tensor:
        return self.drop(self.norm(regions).mean(dim=(2, 3)))


def test_the_pass_leaves_no_trace_and_takes_no_chance() -> None:
    box = branch(size=2, head=Noisy).train()
    box.head.drop.eval()
    samples = box.sample([PROPOSALS], [target()])
    before = {key: value.clone() for key, value in box.state_dict().items()}
    first = hard_regions(box, box.sampler, FEATURES, samples, [4])
    state = torch.get_rng_state()
    assert_close(hard_regions(box, box.sampler, FEATURES, samples, [4]), first)
    assert torch.get_rng_state().equal(state)
    for key, value in box.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)
    assert box.training and box.head.norm.training and not box.head.drop.training
    with pytest.raises(RuntimeError, match="as asked"), predicting(box):
        assert not box.head.norm.training
        raise RuntimeError("as asked")
    assert box.head.norm.training and not box.head.drop.training


def test_gradients_come_from_the_chosen_alone() -> None:
    box, boxes = branch(size=1), PROPOSALS[[0, 2]]
    says(box, [0.5, 0.25, 0.25])
    features = [FEATURES[0][:1].clone().requires_grad_()]
    nn.init.normal_(box.predictor.cls_score.weight, std=0.01)
    (outputs,) = box.learn(features, [boxes], [target()], [4], torch.tensor([[80, 80]]))
    (gradient,) = torch.autograd.grad(sum(box.losses([outputs]).values()), features)
    place = outputs.samples.boxes[0][0]
    assert outputs.class_logits.shape == (1, 3)
    assert gradient.abs().sum() > 0
    outside = gradient.clone()
    outside[:, :, int(place[1]) // 4 : int(place[3]) // 4 + 2, int(place[0]) // 4 : int(place[2]) // 4 + 2] = 0
    assert not outside.any()


CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1)


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, FocalLoss(), SmoothL1(beta=0.5), GIoULoss()], ids=repr)
def test_any_summed_loss_can_be_asked_row_by_row(loss: nn.Module) -> None:
    prediction, target = torch.randn(7, 3), torch.randint(0, 3, (7,))
    if isinstance(loss, SmoothL1 | GIoULoss):
        prediction, target = (torch.rand(2, 7, 4) + torch.tensor([0.0, 0, 1, 1])).unbind()
    slow = torch.stack([loss(row[None], one[None]) for row, one in zip(prediction, target, strict=True)])
    assert_close(one_by_one(loss, prediction, target), slow)
    assert_close(slow.sum(), loss(prediction, target))
    assert one_by_one(loss, prediction[:0], target[:0]).shape == (0,)


def test_a_loss_that_is_not_finite_is_chosen_and_seen() -> None:
    box = branch(size=2)
    samples = RegionSamples([PROPOSALS], [torch.tensor([2, 0, 0, 0, 0])], [torch.zeros(5).long()], [PROPOSALS])
    logits, deltas = torch.zeros(5, 3), torch.zeros(5, 3, 4)
    logits[4, 0], deltas[2] = math.nan, math.nan  # the second is background, whose box is nobody's affair
    losses = region_losses(box, logits, deltas, samples)
    assert losses[4].isnan() and losses[:4].isfinite().all()
    assert box.sampler.hardest(PROPOSALS, losses).tolist()[-1] == 4
