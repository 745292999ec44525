from collections.abc import Iterator

import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.testing import assert_close

from detseg.targets.hard_negatives import HardNegativeSVM, Mined

CLASSES, WIDTH = 3, 6


class Images:
    """Regions of made-up images: class k shifts feature k; half of the rows are background."""

    def __init__(self, count: int = 20, rows: int = 40) -> None:
        generator = torch.Generator().manual_seed(1)
        self.reads = 0
        self.blocks: list[tuple[Tensor, Tensor]] = []
        positives: list[list[Tensor]] = [[] for _ in range(CLASSES)]
        for _ in range(count):
            features = torch.randn(rows, WIDTH, generator=generator)
            label = torch.randint(0, 2 * CLASSES, (rows,), generator=generator)  # above CLASSES - 1: background
            features[torch.arange(rows), label.clamp(max=WIDTH - 1)] += 1.5 * (label < CLASSES)
            features = features * 8
            self.blocks.append((features, label[:, None] != torch.arange(CLASSES)))
            for k in range(CLASSES):
                positives[k].append(features[label == k])
        self.positives = [torch.cat(some) for some in positives]

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        yield from self.blocks

    def all_negatives(self, label: int) -> Tensor:
        return torch.cat([features[negative[:, label]] for features, negative in self.blocks])


def machine(**options: float) -> HardNegativeSVM:
    return HardNegativeSVM(**({"start": 60, "retrain_after": 40, "tolerance": 1e-4} | options))  # type: ignore[arg-type]


def test_mining_ends_at_the_machine_of_all_negatives() -> None:
    """After enough passes no negative beyond its margin is left out, so all of them would change nothing."""
    images = Images()
    found = machine(passes=6).fit(images.positives, images)
    assert found.known.all() and 1 < images.reads <= 6
    for label in range(CLASSES):
        negatives = images.all_negatives(label)
        rows = torch.cat([images.positives[label], negatives]).double().numpy()
        truth = [1] * len(images.positives[label]) + [0] * len(negatives)
        oracle = LinearSVC(
            loss="hinge",
            C=1e-3,
            class_weight={1: 2.0},
            intercept_scaling=10,
            tol=1e-7,
            max_iter=200_000,
            random_state=0,
        ).fit(rows, truth)
        assert_close(found.weight[label].double(), torch.from_numpy(oracle.coef_[0]), rtol=5e-3, atol=5e-4)
        assert float(found.bias[label]) == pytest.approx(float(oracle.intercept_[0]), rel=5e-3, abs=5e-3)


def test_one_pass_comes_close_and_keeps_few() -> None:
    """Section 2.3: mining hardly gains after a single pass."""
    images = Images()
    one, many = machine(passes=1).fit(images.positives, images), machine(passes=6).fit(images.positives, images)
    for label in range(CLASSES):
        rows = torch.cat([features for features, _ in images.blocks])
        margins = [rows @ found.weight[label] + found.bias[label] for found in (one, many)]
        assert (margins[0] - margins[1]).abs().mean() < 0.05


def test_what_is_read_and_kept() -> None:
    """Only hard negatives join a machine that is there, and easy ones leave."""
    positives = [torch.tensor([[4.0, 0.0]] * 30)]
    far, near = torch.tensor([[-40.0, 0.0]] * 10), torch.tensor([[2.0, 0.0]] * 10)
    mined: list[Mined] = []
    solver = HardNegativeSVM(cost=1.0, bias_scale=10, start=10, retrain_after=1000, passes=1)
    everything = torch.ones(10, 1, dtype=torch.bool)
    original = solver._look

    def spy(classes: list[Mined], *rest: object) -> int:
        mined[:] = classes
        joined = original(classes, *rest)  # type: ignore[arg-type]
        sizes.append((joined, len(classes[0].keys)))
        return joined

    sizes: list[tuple[int, int]] = []
    solver._look = spy  # type: ignore[method-assign,assignment]
    found = solver.fit(
        positives, lambda: [(near, everything), (far, everything), (near, everything), (near, ~everything)]
    )
    assert [joined for joined, _ in sizes] == [10, 0, 10, 0], "far ones are easy, those of the last image no negatives"
    margins = near @ found.weight[0] + found.bias[0]
    assert (margins < 0).all() and (positives[0] @ found.weight[0] + found.bias[0] > 0).all()
    assert len(mined[0].keys) == 20 and len(torch.unique(mined[0].keys)) == 20


def test_a_negative_joins_once() -> None:
    mined = Mined(torch.zeros(2, 3))
    features = torch.arange(12.0).reshape(4, 3)
    assert mined.add(5, torch.tensor([0, 2]), features) == 2
    assert mined.add(5, torch.tensor([0, 1, 2]), features) == 1
    assert mined.add(6, torch.tensor([0]), features) == 1
    assert_close(torch.cat(mined.negatives), features[[0, 2, 1, 0]])
    mined.keep(torch.tensor([True, False, True, False]), torch.arange(6.0).double())
    assert_close(mined.negatives[0], features[[0, 1]])
    assert mined.dual.tolist() == [0, 1, 2, 4] and mined.added == 0


def test_classes_without_positives_or_negatives_have_no_machine() -> None:
    images = Images(count=6)
    images.positives[1] = images.positives[1][:0]
    images.blocks = [(features, negative & torch.tensor([True, True, False])) for features, negative in images.blocks]
    found = machine().fit(images.positives, images)
    assert found.known.tolist() == [True, False, False]
    assert not found.weight[1:].any() and not found.bias[1:].any()


def test_features_may_be_in_half_precision_and_images_empty() -> None:
    images = Images(count=10)
    single = machine().fit(images.positives, images)
    images.positives = [rows.half() for rows in images.positives]
    images.blocks = [(features.half(), negative) for features, negative in images.blocks]
    images.blocks.insert(3, (torch.zeros(0, WIDTH).half(), torch.zeros(0, CLASSES, dtype=torch.bool)))
    half = machine().fit(images.positives, images)
    assert half.weight.dtype == torch.float32
    assert_close(half.weight, single.weight, rtol=0.05, atol=5e-3)


def test_numbers_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="cost=0"):
        HardNegativeSVM(cost=0)
    with pytest.raises(ValueError, match="passes=0 at least 1"):
        HardNegativeSVM(passes=0)
    with pytest.raises(ValueError, match=r"easy_margin=-0\.5"):
        HardNegativeSVM(easy_margin=-0.5)
    assert "negative_iou=0.3" in repr(HardNegativeSVM())
