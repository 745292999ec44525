"""A data worker that dies takes the name of the image with it, unless somebody wrote it down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detseg.data.check import DataError
from detseg.data.module import DetectionData
from detseg.data.sample import Sample, SampleDataset
from detseg.data.watch import BUSY, EPOCH, INDEX, PID, Watch, died, named_deaths
from detseg.structures import Target


class Deadly(SampleDataset):
    """Ten grey images; reading number ``bad`` ends the process."""

    class_names, category_ids = ("apple",), (1,)

    def __init__(self, end: Callable[[], Any], bad: int = 5) -> None:
        self.end, self.bad = end, bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        if index == self.bad:
            self.end()
        target = Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64), image_id=index)
        return Sample(torch.zeros((3, 8, 8), dtype=torch.uint8), target)

    def file_of(self, index: int) -> str:
        return f"photos/{index}.jpg"


class DeadlyData(DetectionData):
    def __init__(self, end: Callable[[], Any], workers: int = 2) -> None:
        super().__init__(batch_size=2, num_workers=workers)
        self.end = end

    def read(self, split: str) -> SampleDataset:
        return Deadly(self.end)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def named_error(end: Callable[[], Any], split: str = "val", workers: int = 2) -> BaseException:
    """Read a split until its worker dies; return what is raised, from the loader or out of torch's signal handler."""
    data = DeadlyData(end, workers)
    data.setup("fit")
    loader = data.train_dataloader() if split == "train" else data.eval_dataloader(split)
    if split == "train":
        loader.sampler.set_epoch(3)
    error: BaseException | None = None
    try:
        for _ in loader:
            time.sleep(0.01)
    except (RuntimeError, ValueError) as caught:
        error = died(caught) or caught
    if workers:
        loader._iterator._shutdown_workers()
    assert error is not None
    return error


class TestDeaths:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_names_image_epoch_split_file_and_signal(self, number: signal.Signals):
        error = named_error(kill(number), "train")
        assert isinstance(error, DataError)
        said = str(error)
        assert (
            f"was killed by signal {int(number)} ({number.name}) while it read image 5 of split train, epoch 3" in said
        )
        assert "(photos/5.jpg)" in said and said.startswith("data worker ") and "; " in said

    def test_an_exit_has_its_code(self):
        said = str(named_error(lambda: os._exit(7)))
        assert said.startswith("data worker ") and said.endswith(
            "ended with exit code 7 while it read image 5 of split val, epoch 0 (photos/5.jpg)"
        )

    def test_an_error_in_a_worker_is_none_of_this(self):
        def fail() -> None:
            raise DataError("photos/5.jpg: the image cannot be decoded")

        error = named_error(fail)
        assert isinstance(error, DataError) and "cannot be decoded" in str(error) and died(error) is None

    def test_in_the_main_process_nothing_is_watched(self):
        error = named_error(lambda: (_ for _ in ()).throw(RuntimeError("plain")), workers=0)
        assert type(error) is RuntimeError and str(error) == "plain"


class TestWatch:
    def watch(self, **rows: tuple[int, int, int, int]) -> Watch:
        made = Watch(workers=2, split="train", file_of=lambda index: "")
        for number, row in enumerate(rows.values()):
            made.table[number] = torch.tensor(row)
        return made

    def test_a_worker_that_had_read_its_image(self):
        watch = self.watch(first=(11, 0, 4, 1), second=(12, 2, 9, 0))
        told = died(RuntimeError("DataLoader worker (pid(s) 12, 11) exited unexpectedly"))
        assert str(told) == "data worker 1 (process 12) ended after it had read image 9 of split train, epoch 2"
        told = watch.describe(11, "DataLoader worker (pid 11) is killed by signal: Bus error. ")
        assert told == "data worker 0 (process 11) was killed (Bus error) while it read image 4 of split train, epoch 0"

    def test_unknown_processes_and_other_errors_stay_as_they_are(self):
        watch = self.watch()
        assert watch.describe(4242, "") is None
        assert died(RuntimeError("DataLoader worker (pid 999999999) is killed by signal: Killed. ")) is None
        assert died(RuntimeError("shapes differ")) is None and died(ValueError("DataLoader worker (pid 1)")) is None
        with pytest.raises(RuntimeError, match="shapes differ"), named_deaths(None, None):
            raise RuntimeError("shapes differ")

    def test_a_worker_that_is_started_anew_gets_the_table_alone(self):
        watch = self.watch()
        watch.processes, watch._rows = [object()], watch.table.numpy()
        state = watch.__getstate__()
        assert state["processes"] == () and state["_rows"] is None
        assert state["table"].is_shared() and state["table"].shape == (2, 4)

    def test_columns(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        watch = self.watch()
        with watch.reading(1, 2):
            assert int(watch.table.max()) == -1, "no worker here"
        monkeypatch.setattr("detseg.data.watch.get_worker_info", lambda: type("Worker", (), {"id": 1}))
        with watch.reading(1, 2):
            row = watch.table[1].tolist()
            assert (row[PID], row[EPOCH], row[INDEX], row[BUSY]) == (os.getpid(), 1, 2, 1)
        assert watch.table[1, BUSY] == 0 and watch.table[0].tolist() == [-1] * 4

    def test_an_image_read_for_another_one(self, monkeypatch: pytest.MonkeyPatch):
        """A mosaic reads others; a worker that dies then dies of them, and afterwards of its own."""
        watch = self.watch()
        monkeypatch.setattr("detseg.data.watch.get_worker_info", lambda: type("Worker", (), {"id": 0}))
        with watch.reading(4, 2):
            for other in (7, 9):
                with watch.reading(4, other):
                    assert watch.table[0].tolist() == [os.getpid(), 4, other, 1]
                assert watch.table[0].tolist() == [os.getpid(), 4, 2, 1]
            with pytest.raises(DataError), watch.reading(4, 8):
                raise DataError("broken")
            assert watch.table[0, INDEX] == 2
        assert watch.table[0].tolist() == [os.getpid(), 4, 2, 0]
