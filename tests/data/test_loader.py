from __future__ import annotations

import cv2
import numpy as np
import pytest
from torch.utils.data import Dataset

from detseg.data.loader import LateLoader, one_opencv_thread


class Resized(Dataset[int]):
    """Uses OpenCV in parallel, as transforms and proposals do; an item is the number of its threads there."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        work()
        return int(cv2.getNumThreads())


def work() -> None:
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500), interpolation=cv2.INTER_CUBIC)


def one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


@pytest.fixture
def threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    work()  # starts the pool, whose threads no worker inherits
    yield 4
    cv2.setNumThreads(before)


@pytest.mark.parametrize("start", [None, one_thread])
def test_workers_do_not_wait_for_opencvs_threads_of_the_process_that_started_them(threads: int, start: object) -> None:
    loader = LateLoader(Resized(), batch_size=None, num_workers=2, worker_init_fn=start, timeout=60)
    assert list(loader) == [1] * 4
    assert cv2.getNumThreads() == threads
    work()


def test_the_number_of_threads_comes_back_after_an_error(threads: int) -> None:
    with pytest.raises(RuntimeError, match="no workers"), one_opencv_thread():
        assert cv2.getNumThreads() == 1
        raise RuntimeError("no workers")
    assert cv2.getNumThreads() == threads
