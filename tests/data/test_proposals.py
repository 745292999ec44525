from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.data import Coco, DetectionTrain, Orchard, Sample, SampleDataset
from detseg.data.check import DataError
from detseg.data.proposals import ProposedDataset
from detseg.ops.selective_search import SelectiveSearch
from detseg.ops.sliding_window import SlidingWindow
from detseg.structures import Batch, Target
from drawn_data import scenes, write_coco


class Counting:
    """Proposes one box per image, as wide as the sum of its pixels says; notes every call in a file."""

    key = "Counting"

    def __init__(self, notes: Path, *, fail_at: int | None = None, seconds: float = 0.0) -> None:
        self.notes, self.fail_at, self.seconds = notes, fail_at, seconds

    def __call__(self, image: Tensor) -> Tensor:
        number = int(image[0, 0, 0])
        time.sleep(self.seconds)
        if number == self.fail_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.notes.open("a") as file:
            file.write(f"{number}\n")
        return torch.tensor([[0.0, 0, number + 1, 8]]) if number else torch.zeros((0, 4))

    def calls(self) -> list[int]:
        return sorted(int(line) for line in self.notes.read_text().split()) if self.notes.exists() else []


class Numbered(SampleDataset):
    """``count`` images of 8 x 8 filled with their number; ``root`` and files only where wanted."""

    class_names, category_ids = ("a",), (1,)

    def __init__(self, count: int, root: Path | None = None) -> None:
        self.count, self.loads = count, 0
        if root is not None:
            self.root = root
            root.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.loads += 1
        target = Target(torch.tensor([[1.0, 1, 5, 6]]), torch.tensor([0]), image_id=index, size=(8, 8))
        return Sample(torch.full((3, 8, 8), index, dtype=torch.uint8), target)

    def file_of(self, index: int) -> str:
        return f"{index}.png"

    def identity(self, index: int) -> str:
        return f"{index}" if hasattr(self, "root") else ""


def dataset(tmp_path: Path, count: int = 6, *, root: bool = True, **options: Any) -> ProposedDataset:
    samples = Numbered(count, tmp_path / "data" if root else None)
    return ProposedDataset(samples=samples, proposer=Counting(tmp_path / "notes", **options), name="train")


class TestDataset:
    def test_samples_get_their_proposals_once_made(self, tmp_path: Path) -> None:
        split = dataset(tmp_path)
        for _ in range(2):
            widths = [split[index].target.proposals[:, 2].tolist() for index in range(6)]  # type: ignore[index]
            assert widths == [[], [2], [3], [4], [5], [6]]  # an image without proposals is one as any other
        assert split.proposer.calls() == [0, 1, 2, 3, 4, 5]
        again = dataset(tmp_path)
        assert_close(again[3].target.proposals, torch.tensor([[0.0, 0, 4, 8]]))
        assert again.proposer.calls() == [0, 1, 2, 3, 4, 5]

    def test_a_lost_or_damaged_file_is_made_again_with_one_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        split = dataset(tmp_path)
        split.fill()
        files = {path.stem: path for path in (tmp_path / "data").rglob("*.boxes")}
        assert len(files) == 6
        damaged, lost = (files[split.make(index).digest] for index in (2, 4))
        damaged.write_bytes(damaged.read_bytes()[:20])
        lost.unlink()
        known = dataset(tmp_path)
        assert known.fill().finished
        caplog.clear()  # where other tests have made the logger speak, the first filling is in it
        with caplog.at_level(logging.INFO):
            for index in range(6):
                assert len(known[index].target.proposals) == (index > 0)  # type: ignore[arg-type]
        assert [record.levelname for record in caplog.records] == ["WARNING"] and str(damaged) in caplog.text
        assert known.proposer.calls() == [0, 1, 2, 2, 3, 4, 4, 5] and lost.exists()


class TestFill:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("root", [True, False])
    def test_makes_each_once_and_knows_when_it_is_done(self, workers: int, root: bool, tmp_path: Path) -> None:
        split = dataset(tmp_path, root=root)
        filling = split.fill(workers=workers)
        assert (filling.images, filling.made, filling.boxes, filling.finished) == (6, 6, 5, False)
        assert filling.seconds > 0 and split.proposer.calls() == [0, 1, 2, 3, 4, 5]
        again = dataset(tmp_path, root=root)
        filling = again.fill(workers=workers)
        assert filling.made == 0 and again.proposer.calls() == [0, 1, 2, 3, 4, 5]
        # Where files tell whether an image has changed, none is read to know that the split is complete.
        assert filling.finished == root and (again.samples.loads == 0 or not root)  # type: ignore[attr-defined]
        if root:
            again[3]
            assert again.samples.loads == 1  # type: ignore[attr-defined]

    def test_an_image_that_changed_gets_new_ones(self, tmp_path: Path) -> None:
        drawn = scenes(3)
        write_coco(tmp_path, drawn)
        data = Coco(root=tmp_path, val=None, num_workers=0)
        proposer = SlidingWindow(scales=[8], ratios=[1.0], stride=1.0)
        split = ProposedDataset(samples=data.dataset("train"), proposer=proposer)
        assert split.fill().made == 3 and split.fill().finished
        file = tmp_path / "train" / "001.png"
        drawn[1].pixels[0, 0] += 1
        write_coco(tmp_path, drawn)
        assert file.exists()
        fresh = ProposedDataset(samples=Coco(root=tmp_path, val=None).dataset("train"), proposer=proposer)
        filling = fresh.fill()
        assert not filling.finished and filling.made == 1

    def test_another_proposer_makes_its_own(self, tmp_path: Path) -> None:
        samples = Numbered(3, tmp_path / "data")
        for stride in (0.5, 1.0):
            proposer = SlidingWindow(scales=[4], ratios=[1.0], stride=stride)
            split = ProposedDataset(samples=samples, proposer=proposer)
            assert split.fill().made == 3
            assert len(split[0].target.proposals) == {0.5: 9, 1.0: 4}[stride]  # type: ignore[arg-type]

    def test_a_worker_that_dies_names_its_image_and_what_was_made_stays(self, tmp_path: Path) -> None:
        broken = dataset(tmp_path, count=12, fail_at=7)
        with pytest.raises(DataError, match=r"image 7 of split train.*\(7\.png\)"):
            broken.fill(workers=2)
        kept = len(list((tmp_path / "data").rglob("*.boxes")))
        assert kept in (len(broken.proposer.calls()), len(broken.proposer.calls()) - 1)  # the other worker's last
        split = dataset(tmp_path, count=12)
        filling = split.fill()
        assert filling.made == 12 - kept and sorted(set(split.proposer.calls())) == list(range(12))

    def test_lines_tell_how_far_it_is(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("detseg.data.proposals.REPORT_SECONDS", -1)
        with caplog.at_level(logging.INFO):
            dataset(tmp_path, count=2).fill()
            dataset(tmp_path / "..", count=2).fill(rank=1, world_size=2)
        assert caplog.messages[:2] == [f"proposals of split train: {n} of 2 images, {n} made" for n in (1, 2)]
        assert "2 images" in caplog.messages[2] and "by Counting" in caplog.messages[2] and len(caplog.messages) == 3


FORK = multiprocessing.get_context("fork")
"""Processes of their own, to be killed, in which nothing has to be imported again."""


def filler(tmp_path: Path, *, seconds: float, workers: int = 0) -> BaseProcess:
    """Start a process, which leads a group, that fills 40 images, ``seconds`` each."""
    begins = FORK.Event()

    def fill() -> None:
        os.setsid()
        torch.set_num_threads(1)
        split = dataset(tmp_path, count=40, seconds=seconds)
        begins.set()
        split.fill(workers=workers)

    process = FORK.Process(target=fill)
    process.start()
    assert begins.wait(60)
    return process


@pytest.mark.slow
class TestKilled:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_filling_goes_on_where_a_killed_one_was(self, workers: int, tmp_path: Path) -> None:
        made: list[int] = []
        for _ in range(3):
            process = filler(tmp_path, seconds=0.05, workers=workers)
            time.sleep(0.35)
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # it has been started
            process.join()
            made.append(len(list((tmp_path / "data").rglob("*.boxes"))))
        split = dataset(tmp_path, count=40)
        filling = split.fill()
        assert 0 < made[-1] < 40 and made == sorted(made)
        assert not filling.finished and filling.made == 40 - made[-1]
        assert [len(split[index].target.proposals) for index in range(40)] == [0] + [1] * 39  # type: ignore[arg-type]
        # What a kill can cost is the image under way in each process, no more.
        assert len(split.proposer.calls()) <= 40 + 3 * max(1, workers)
        assert dataset(tmp_path, count=40).fill().finished

    def test_two_that_fill_at_once_share_the_work(self, tmp_path: Path) -> None:
        processes = [filler(tmp_path, seconds=0.05) for _ in range(2)]
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        split = dataset(tmp_path, count=40)
        assert split.fill().finished
        calls = split.proposer.calls()
        # An image under way counts as missing: by chance both make 1 of r left, which adds up to 4.3 of 40, at most 12.
        assert set(calls) == set(range(40)) and len(calls) <= 52
        assert list((tmp_path / "data").rglob("*.part")) == []


class TestModule:
    def data(self, workers: int = 0, **options: Any) -> Orchard:
        data = Orchard(train_images=6, val_images=3, image_size=48, num_workers=workers, batch_size=2, **options)
        data.proposer = SlidingWindow(scales=[16], ratios=[1.0, 2.0], stride=0.5)
        return data

    def test_batches_do_not_depend_on_the_number_of_workers(self) -> None:
        recipe = DetectionTrain(scale=(0.5, 1.5), crop=(48, 48))
        one, other = (list(self.data(workers, train_transform=recipe).train_dataloader()) for workers in (0, 2))
        assert len(one) == len(other) == 3
        for first, second in zip(one, other, strict=True):
            assert_close(first.images, second.images, rtol=0, atol=0)
            assert first.proposals is not None and second.proposals is not None
            for boxes, same in zip(first.proposals, second.proposals, strict=True):
                assert len(boxes) > 20 and torch.equal(boxes, same)
            assert [target.proposals for target in first.targets] == [None, None]

    def test_evaluation_has_proposals_and_truths_none(self) -> None:
        data = self.data()
        data.setup("validate")
        batches: list[Batch] = list(data.val_dataloader())
        assert [len(batch.proposals) for batch in batches] == [2, 1]  # type: ignore[arg-type]
        expected = data.proposer.windows(48, 48)  # type: ignore[union-attr]
        for batch in batches:
            assert batch.truths is not None and all(truth.proposals is None for truth in batch.truths)
            assert all(torch.equal(boxes, expected) for boxes in batch.proposals)  # type: ignore[union-attr]

    def test_without_a_proposer_nothing_changes(self) -> None:
        data = self.data()
        data.proposer = None
        data.setup()
        assert next(iter(data.train_dataloader())).proposals is None
        assert data.samples("train") is data.dataset("train")

    def test_setup_fills_what_the_stage_needs(self, own_cache: Path) -> None:
        data = self.data()
        data.setup("validate")
        assert len(list(own_cache.rglob("*.boxes"))) == 3
        data.setup("fit")
        assert len(list(own_cache.rglob("*.boxes"))) == 9
        data.proposer = SelectiveSearch(mode="single")
        assert data.samples("train").proposer is data.proposer  # type: ignore[attr-defined]  # another one, another cache
        assert len(list(own_cache.rglob("*.boxes"))) == 9

    @pytest.mark.parametrize("setting", [{"fast_dev_run": 1}, {"overfit_batches": 1}, {"limit_train_batches": 2}])
    def test_a_quick_look_fills_nothing(self, setting: dict[str, int], own_cache: Path, tmp_path: Path) -> None:
        import lightning as L

        data = self.data()
        data.trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **setting)  # type: ignore[arg-type]
        data.fill_proposals("train")
        assert not list(own_cache.rglob("*.boxes"))
        assert next(iter(data.train_dataloader())).proposals is not None  # made where they are missed
        assert len(list(own_cache.rglob("*.boxes"))) == 2
