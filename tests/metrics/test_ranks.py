"""Every metric gives the same figures, bit for bit, however the images are shared out among processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

import metric_ranks


@pytest.mark.parametrize(
    "shares", [[[7, 0], [0, 7], [5, 2]], [[3, 2, 2], [0, 0, 7], [4, 0, 3]]], ids=["two ranks", "three ranks"]
)
def test_the_same_on_uneven_ranks(shares: list[list[int]], tmp_path: Path) -> None:
    world = len(shares[0])
    context = multiprocessing.get_context("forkserver")  # torch is loaded once, not once per rank
    context.set_forkserver_preload(["detseg.metrics"])
    ranks = [
        context.Process(target=metric_ranks.rank, args=(number, world, str(tmp_path), shares))
        for number in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world

    alone = metric_ranks.results(list(range(metric_ranks.IMAGES)), step=7)
    assert float(alone["boxes"]["map"]) > 0.2 and float(alone["masks"]["map"]) > 0.2
    assert float(alone["voc 2007"]["map"]) > 0.2 and float(alone["quality"]["mask_quality_count"]) > 3
    for turn in range(len(shares)):
        for number in range(world):
            together = torch.load(tmp_path / f"{turn}-{number}.pt", weights_only=True)
            torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)
