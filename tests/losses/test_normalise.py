from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from detseg.losses.normalise import normaliser


def test_one_process_counts_its_own_and_at_least_one() -> None:
    assert normaliser(torch.tensor(7)).item() == 7.0
    assert normaliser(torch.tensor(0)).item() == 1.0


def _worker(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    together = normaliser(torch.tensor([3, 8][rank]))
    with torch.no_grad():
        alone = normaliser(torch.tensor([3, 8][rank]))
    torch.save(torch.stack((together, alone)), f"{results}{rank}")
    distributed.destroy_process_group()


def test_ranks_share_the_average_in_training_and_do_not_wait_in_validation(tmp_path: Path) -> None:
    arguments = str(tmp_path / "store"), str(tmp_path / "rank")
    multiprocessing.start_processes(_worker, arguments, nprocs=2, start_method="fork")  # spawn imports torch anew
    assert torch.load(tmp_path / "rank0").tolist() == [5.5, 3.0]
    assert torch.load(tmp_path / "rank1").tolist() == [5.5, 8.0]
