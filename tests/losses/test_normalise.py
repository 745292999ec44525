from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.testing import assert_close

from detseg.losses.normalise import normaliser, sum_over_ranks

COUNTS = [[3, 8], [0, 1], [0, 0]]
"""Positives of two ranks, case by case."""


def test_one_process_counts_its_own_and_at_least_one() -> None:
    assert normaliser(torch.tensor(7)).item() == 7.0
    assert normaliser(torch.tensor(0)).item() == 1.0
    assert normaliser(torch.tensor(0.0, dtype=torch.float64), least=0.25).item() == 0.25
    assert normaliser(torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float64


def test_one_process_adds_nothing_to_its_sums() -> None:
    part = torch.tensor([1.0, 2.0], requires_grad=True)
    sum_over_ranks(part).square().sum().backward()
    assert part.grad is not None
    assert part.grad.tolist() == [2.0, 4.0]


def _worker(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    together = torch.stack([normaliser(torch.tensor(counts[rank])) for counts in COUNTS])
    with torch.no_grad():
        alone = torch.stack([normaliser(torch.tensor(counts[rank])) for counts in COUNTS])
    weight = torch.tensor(2.0, requires_grad=True)
    total = sum_over_ranks(weight * [1.0, 3.0][rank])  # 2 * (1 + 3)
    total.square().backward()
    torch.save((together, alone, total.detach(), weight.grad), f"{results}{rank}")
    distributed.destroy_process_group()


@pytest.fixture
def ranks(tmp_path: Path) -> list[tuple[torch.Tensor, ...]]:
    arguments = str(tmp_path / "store"), str(tmp_path / "rank")
    multiprocessing.start_processes(_worker, arguments, nprocs=2, start_method="fork")  # spawn imports torch anew
    return [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]


def test_ranks_share_the_average_in_training_and_do_not_wait_in_validation(ranks: list[tuple[torch.Tensor, ...]]):
    for together, *_ in ranks:  # at least one positive among all ranks, thus at least half a one on average
        assert together.tolist() == [5.5, 0.5, 0.5]
    assert ranks[0][1].tolist() == [3.0, 1.0, 1.0]
    assert ranks[1][1].tolist() == [8.0, 1.0, 1.0]


def test_sums_over_ranks_give_the_average_gradient_of_the_whole(ranks: list[tuple[torch.Tensor, ...]]):
    assert [float(total) for *_, total, _ in ranks] == [8.0, 8.0]
    average = (ranks[0][3] + ranks[1][3]) / 2
    assert_close(average, torch.tensor(2 * 8.0 * 4))  # d (4 w)^2 / dw at w = 2
