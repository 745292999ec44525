from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from detseg.ops.size_clusters import cluster_sizes, mean_best_iou, size_iou

PLANTED = torch.tensor([[8.0, 9], [20, 50], [60, 30], [100, 110]])


def planted(each: int = 50, spread: float = 0.08) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = 1 + spread * torch.randn((len(PLANTED), each, 2), generator=generator).clamp(-2, 2)
    return (PLANTED[:, None] * noise).reshape(-1, 2)


def slow_lloyd(sizes: Tensor, centres: Tensor) -> Tensor:
    """K-means one box at a time, from given centres."""
    for _ in range(50):
        members: list[list[Tensor]] = [[] for _ in centres]
        for size in sizes:
            overlaps = [
                float(
                    torch.minimum(size, one).prod()
                    / torch.maximum(size.prod() + one.prod() - torch.minimum(size, one).prod(), torch.tensor(0.0))
                )
                for one in centres
            ]
            members[overlaps.index(max(overlaps))].append(size)
        centres = torch.stack([torch.stack(own).mean(dim=0) for own in members])
    return centres


def test_iou_of_sizes_is_that_of_boxes_on_one_corner() -> None:
    first, second = torch.rand(20, 2) + 0.1, torch.rand(7, 2) + 0.1
    boxes = [torch.cat([torch.zeros_like(sizes), sizes], dim=1) for sizes in (first, second)]
    assert_close(size_iou(first, second), box_iou(*boxes))
    assert mean_best_iou(torch.tensor([[2.0, 2], [4, 1]]), torch.tensor([[2.0, 2], [1, 1]])) == pytest.approx(
        (1 + 1 / 3) / 2
    )


def test_planted_clusters_are_found() -> None:
    found = cluster_sizes(planted(), 4, seed=3)
    assert_close(found, PLANTED.double(), rtol=0.03, atol=0)
    means = planted().double().view(4, 50, 2).mean(dim=1)
    assert_close(found, means)  # every box lies nearest to its own cluster
    assert mean_best_iou(planted(), found) > 0.85


def test_equals_one_box_at_a_time() -> None:
    sizes = torch.rand(60, 2, dtype=torch.float64) * 50 + 1
    found = cluster_sizes(sizes, 3, starts=1)
    assert_close(slow_lloyd(sizes, found), found)  # a fixed point of the slow twin


def test_the_same_again_and_better_with_more_clusters_and_starts() -> None:
    sizes = torch.rand(200, 2) * 90 + 3
    assert torch.equal(cluster_sizes(sizes, 5, seed=1), cluster_sizes(sizes, 5, seed=1))
    assert torch.equal(cluster_sizes(sizes, 5, seed=1), cluster_sizes(sizes[torch.randperm(200)], 5, seed=1))
    covered = [mean_best_iou(sizes, cluster_sizes(sizes, count)) for count in (1, 2, 4, 8)]
    assert covered == sorted(covered) and covered[-1] > covered[0] + 0.1
    one, many = (mean_best_iou(sizes, cluster_sizes(sizes, 5, starts=starts)) for starts in (1, 20))
    assert many >= one


def test_as_many_clusters_as_sizes_and_repeated_sizes() -> None:
    sizes = torch.tensor([[5.0, 5], [20, 10], [5, 5], [5, 5]])
    assert cluster_sizes(sizes, 2).tolist() == [[5, 5], [20, 10]]
    assert cluster_sizes(sizes, 1).tolist() == [[8.75, 6.25]]  # repeated ones weigh


@pytest.mark.parametrize(
    ("sizes", "count", "said"),
    [
        ([[5.0, 5], [5, 5], [2, 3]], 3, "3 clusters of 3 boxes with 2 different sizes"),
        ([], 1, "1 clusters of 0 boxes"),
        ([[5.0, 5]], 0, "0 clusters"),
        ([[5.0, 5], [0, 3]], 1, r"size 1 is \[0.0, 3.0\]"),
        ([[5.0, float("inf")]], 1, "size 0 is"),
    ],
)
def test_degenerate_sizes_are_named(sizes: list[list[float]], count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cluster_sizes(torch.tensor(sizes).reshape(-1, 2), count)
