from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.losses.grouping import GroupingLoss, pull_loss, push_loss


def _loops(first: Tensor, second: Tensor, image: Tensor, batch: int, margin: float) -> tuple[float, float]:
    """Equations 4 and 5 as they stand."""
    pull = push = 0.0
    for index in range(batch):
        pairs = list(zip(first[image == index].tolist(), second[image == index].tolist(), strict=True))
        means = [(top + bottom) / 2 for top, bottom in pairs]
        count = len(pairs)
        for (top, bottom), mean in zip(pairs, means, strict=True):
            pull += ((top - mean) ** 2 + (bottom - mean) ** 2) / count / batch
        for k in range(count):
            for j in range(count):
                if j != k:
                    push += max(0.0, margin - abs(means[k] - means[j])) / (count * (count - 1)) / batch
    return pull, push


@pytest.mark.parametrize("margin", [1.0, 0.4])
def test_equal_loops_over_images_and_pairs(margin: float) -> None:
    image = torch.tensor([0] * 6 + [2] + [3] * 9)  # the second image is empty, the third has one object
    first, second = torch.randn(2, 16, dtype=torch.float64)
    found = GroupingLoss(margin=margin)(first, second, image, 5)
    assert_close(torch.stack(found).tolist(), list(_loops(first, second, image, 5, margin)), rtol=1e-12, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    image = torch.tensor([0, 0, 0, 1, 1])
    pair = tuple(torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: GroupingLoss()(a, b, image, 2), pair)


def test_by_hand() -> None:
    image = torch.tensor([0, 0])
    assert_close(pull_loss(torch.tensor([1.0, 0]), torch.tensor([3.0, 0]), image, 1), torch.tensor(1.0))  # (1 + 1) / 2
    assert_close(push_loss(torch.tensor([2.0, 2.25]), image, 1), torch.tensor(0.75))
    assert push_loss(torch.tensor([2.0, 3.5]), image, 1) == 0


def test_no_objects_keep_the_graph() -> None:
    embedding = torch.zeros(0, requires_grad=True)
    pull, push = GroupingLoss()(embedding, embedding, torch.zeros(0, dtype=torch.int64), 2)
    (pull + push).backward()
    assert (pull.item(), push.item()) == (0.0, 0.0) and embedding.grad is not None


def test_a_margin_that_pushes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin is 0\.0"):
        GroupingLoss(margin=0.0)
