from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.models import RCNN
from detseg.models.region_features import stack_regions
from detseg.models.svm_branch import SVMBranch
from detseg.models.warped_crop import WarpedCrop
from detseg.nn import CheckpointMismatch, TinyBackbone, load_weights
from detseg.nn.region_network import BackboneNetwork
from detseg.structures import Target
from detseg.targets.hard_negatives import HardNegativeSVM
from detseg.targets.samplers import HardSampler


class Quarters:
    """Proposes the quarters of an image."""

    key = "quarters"

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[1] / 2, image.shape[2] / 2
        return torch.tensor([[0, 0, w, h], [w, 0, 2 * w, h], [0, h, w, 2 * h], [w, h, 2 * w, 2 * h]])


def model(num_classes: int = 2, **options: Any) -> RCNN:
    torch.manual_seed(0)
    body = TinyBackbone(widths=(8, 12), stem=6)
    body.mean, body.std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
    parts: dict[str, Any] = {
        "pooling": WarpedCrop(output_size=16, context=1.0),
        "head": partial(BackboneNetwork, backbone=body, widths=[10]),
        "score_threshold": 0.0,
    }
    return RCNN(num_classes=num_classes, proposer=Quarters(), box=partial(SVMBranch, **(parts | options)))


def batch() -> tuple[Tensor, Tensor, list[Target]]:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    targets = [
        Target(boxes=torch.tensor([[1.0, 1, 23, 15]]), labels=torch.tensor([1])),
        Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]
    return images, torch.tensor([[32, 48], [24, 40]]), targets


@torch.no_grad()
def test_a_region_is_described_by_the_network_on_its_crop_of_the_normalised_image() -> None:
    detector = model().eval()
    images, sizes, _ = batch()
    assert_close(detector.normalize.mean, torch.tensor([0.5, 0.4, 0.3]))  # those of the network's weights
    assert detector.strides == [1]
    outputs = detector(images, sizes)
    normalised = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
    normalised[1, :, 24:], normalised[1, :, :, 40:] = 0, 0
    assert_close(outputs.features, [normalised])
    regions = stack_regions([Quarters()(images[0])])
    crops = WarpedCrop(output_size=16, context=1.0)([normalised], regions, [1])
    assert_close(detector.box.describe(outputs.features, regions, [1])[1], detector.box.head(crops))


def test_fine_tuning_draws_a_quarter_of_objects_and_the_rest_background() -> None:
    """32 of 128 for two images (section 2.3); the object itself joins its proposals."""
    detector = model()
    images, sizes, targets = batch()
    losses = detector.loss(outputs := detector(images, sizes, targets), targets)
    assert set(losses) == {"loss_classifier"} and outputs.samples is not None
    assert [labels.tolist() for labels in outputs.samples.labels] == [[2, 0, 0, 0, 2], [0, 0, 0, 0]]
    losses["loss_classifier"].backward()
    assert [name for name, value in detector.named_parameters() if value.grad is None] == []
    assert detector.box.sampler.size == 64 and detector.box.sampler.positive_fraction == 0.25  # type: ignore[union-attr]


def test_hard_examples_are_those_of_the_largest_softmax_loss() -> None:
    detector = model(sampler=HardSampler(size=2, threshold=1.0)).eval()
    images, sizes, targets = batch()
    hard = detector(images, sizes, targets).regions[0]
    every = model().eval()(images, sizes, targets).regions[0]
    each = torch.nn.functional.cross_entropy(every.class_logits, torch.cat(every.samples.labels), reduction="none")
    for index, losses in enumerate(torch.split(each, [5, 4])):
        rows = losses.topk(2).indices.sort().values
        assert_close(hard.samples.boxes[index], every.samples.boxes[index][rows])


@torch.no_grad()
def test_predictions_do_not_depend_on_company() -> None:
    detector = model().eval()
    images, sizes, _ = batch()
    both = detector.predict(detector(images, sizes), sizes)
    alone = images[1:, :, :24, :40].contiguous()
    single = detector.predict(detector(alone), sizes[1:])[0]
    assert len(single) > 0
    assert_close(single.scores, both[1].scores)
    assert_close(single.boxes, both[1].boxes)


@torch.no_grad()
def test_fitted_parts_travel_with_the_state() -> None:
    first, second = (model(svm=HardNegativeSVM(cost=10.0)).eval() for _ in range(2))
    images, sizes, targets = batch()
    outputs = first(images, sizes)
    found = [
        first.box.examples(outputs.features, row, boxes, target, [1])
        for row, (boxes, target) in enumerate(zip(outputs.given, targets, strict=True))
    ]
    assert first.box.fit_svms(lambda: found) == [0, 1] and first.box.fit_ridge(lambda: found) == [0, 1]
    second.load_state_dict(first.state_dict())
    one, two = (detector.predict(detector(images, sizes), sizes) for detector in (first, second))
    assert_close(one[0].boxes, two[0].boxes)
    assert_close(one[0].scores, two[0].scores)
    assert one[0].labels.tolist() == [1] * len(one[0])
    assert_close(one[0].boxes[0], targets[0].boxes[0], rtol=0, atol=0.5)  # one pair, so the regression repeats it


def test_weights_of_other_classes_give_the_network_alone() -> None:
    """What ``init_from`` with ``drop_head`` does."""
    first, second = model(num_classes=2), model(num_classes=5)
    torch.nn.init.normal_(first.box.head.layers[1].weight)  # type: ignore[arg-type,index,union-attr]
    dropped = load_weights(second, first.state_dict(), drop_head=True)
    assert {key.rsplit(".", 1)[0] for key in dropped} == {"box.predictor.cls_score", "box.svms", "box.ridge"}
    for key, value in first.box.head.state_dict().items():
        assert_close(second.box.head.state_dict()[key], value)
    with pytest.raises(CheckpointMismatch, match="cls_score"):
        load_weights(second, first.state_dict())


def test_the_chunk_bounds_how_many_crops_there_are_at_once() -> None:
    detector = model(chunk=3).eval()
    images, sizes, _ = batch()
    seen: list[int] = []
    detector.box.pooling.register_forward_hook(lambda module, given, crops: seen.append(len(crops)))
    with torch.no_grad():
        detector.predict(detector(images, sizes), sizes)
    assert seen == [3, 3, 2]


def test_a_proposer_is_needed() -> None:
    with pytest.raises(ValueError, match="give either"):
        RCNN(num_classes=2, proposer=None, box=SVMBranch)  # type: ignore[arg-type]
