"""The batch-size finder: its search, the worst batch, and trials that run out of memory in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import detseg
from detseg.data import Orchard
from detseg.data.transforms import DetectionTrain
from detseg.engine.finders import batch_finder
from detseg.engine.finders.batch_finder import Attempt, find_batch, override_line, search, try_size
from detseg.engine.finders.batch_trial import first_device, means_memory, most_proposals, prepare
from detseg.engine.finders.worst_batch import Worst, WorstData, batch_of, find_worst, read_worst
from detseg.ops.selective_search import SelectiveSearch
from detseg.structures import Target

TINY = ["trainer=cpu", "data.train_images=16", "data.val_images=2", "data.num_workers=0", "data.image_size=64"]


class TestSearch:
    def tried(self, limit: int, **settings: int) -> list[tuple[int, bool]]:
        attempts = search(lambda images: Attempt(images, fits=images <= limit), **settings)
        return [(one.images, one.fits) for one in attempts]

    def test_doubles_then_halves_the_gap(self):
        assert self.tried(11, start=2, largest=512) == [
            (2, True), (4, True), (8, True), (16, False), (12, False), (10, True), (11, True),
        ]  # fmt: skip

    def test_goes_below_its_start(self):
        assert self.tried(1, start=2, largest=512) == [(2, False), (1, True)]
        assert self.tried(0, start=2, largest=512) == [(2, False), (1, False)]

    def test_ends_at_the_largest(self):
        assert self.tried(1000, start=2, largest=9) == [(2, True), (4, True), (8, True), (9, True)]
        assert self.tried(1000, start=64, largest=5) == [(5, True)]

    @pytest.mark.parametrize("limit", [1, 3, 7, 63, 100, 317])
    def test_finds_the_limit_within_an_eighth(self, limit: int):
        tried = self.tried(limit, start=2, largest=512)
        best = max(images for images, fits in tried if fits)
        assert limit - limit // 8 <= best <= limit and len(tried) <= 16
        assert len({images for images, _ in tried}) == len(tried)  # none twice


class TestWorst:
    def data(self, transform: object = None) -> Orchard:
        return Orchard(train_images=40, image_size=(64, 96), truth="instances", train_transform=transform)

    def test_is_the_fullest_of_all_images(self):
        data = self.data()
        worst = find_worst(data, scan=None)
        samples = data.dataset("train")
        assert worst.size == (64, 96) and worst.images == 40
        assert len(worst.target) == max(len(samples[row].target) for row in range(40)) > 3

    def test_is_as_large_as_the_recipe_makes_any(self):
        """Short side 100 of a 64 x 96 image gives 100 x 150; the scale only cuts or fills."""
        worst = find_worst(self.data(DetectionTrain(short_side=100, scale=(0.5, 1.5))), scan=8)
        assert worst.size == (100, 150) and worst.images == 8

    def test_batches_are_padded_noise_with_every_object_in_each(self):
        worst = find_worst(self.data(), scan=None)
        batch = batch_of(Worst((80, 100), worst.target, 1), 3, size_divisor=32)
        assert batch.images.shape == (3, 3, 96, 128) and batch.sizes.tolist() == [[80, 100]] * 3
        assert batch.images[0, :, :80, :100].float().std() > 50 and int(batch.images[:, :, 80:].sum()) == 0
        for target in batch.targets:
            assert len(target) == len(worst.target) and target.masks.shape == (len(target), 80, 100)
            torch.testing.assert_close(target.boxes, worst.target.boxes * torch.tensor([100 / 96, 80 / 64] * 2))

    def test_a_model_that_is_given_proposals_gets_as_many_as_there_may_be(self):
        batch = batch_of(Worst((80, 100), find_worst(self.data(), scan=2).target, 1), 2, proposals=70)
        assert [boxes.shape for boxes in batch.proposals] == [(70, 4)] * 2
        for boxes in batch.proposals:
            assert (boxes[:, :2] < boxes[:, 2:]).all() and (boxes >= 0).all()
            assert (boxes.amax(dim=0)[2:] <= torch.tensor([100, 80])).all() and boxes[:, 2].max() > 90
        given = WorstData(worst=find_worst(self.data(), scan=2), batch_size=3, proposals=0)
        assert [len(boxes) for boxes in next(iter(given.train_dataloader())).proposals] == [0, 0, 0]
        assert next(iter(WorstData(worst=given.worst, batch_size=3).train_dataloader())).proposals is None

    @pytest.mark.parametrize(
        "proposer, expected",
        [(SelectiveSearch(limit=9), 9), (SelectiveSearch(limit=None), 10_000), (None, None)],
    )
    def test_their_number_is_the_limit_of_what_makes_them(self, proposer: object, expected: int | None):
        model = torch.nn.Linear(1, 1)
        model.proposer = proposer
        assert most_proposals(model) == expected and most_proposals(torch.nn.Linear(1, 1)) is None

    def test_comes_back_from_its_file(self, tmp_path: Path):
        worst = find_worst(Orchard(train_images=4, image_size=64, truth="semantic"), scan=None)
        again = read_worst(worst.save(tmp_path / "worst.pt"))
        assert again.size == worst.size and again.images == 4
        assert torch.equal(again.target.boxes, worst.target.boxes)
        assert torch.equal(again.target.semantic.labels, worst.target.semantic.labels)

    def test_an_image_without_objects_will_do(self):
        target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), size=(8, 8))
        target.masks = torch.zeros(0, 8, 8, dtype=torch.bool)
        batch = batch_of(Worst((32, 32), target, 1), 2)
        assert [len(one) for one in batch.targets] == [0, 0] and batch.targets[0].masks.shape == (0, 32, 32)


class TestJudging:
    popen = subprocess.Popen  # as it is before a test replaces it

    def judged(self, monkeypatch: pytest.MonkeyPatch, directory: Path, script: str, **settings: float) -> Attempt:
        """Try a size with a child that runs ``script`` instead; ``result`` is the file that it may write."""
        plain = self.popen

        def child(command: list[str], **options: object) -> subprocess.Popen[bytes]:
            result = command[command.index("--result") + 1]
            return plain([sys.executable, "-c", f"result = {result!r}\n{script}"], **options)

        monkeypatch.setattr(batch_finder.subprocess, "Popen", child)
        return try_size(4, directory, **settings)

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT"])
    def test_a_killed_trial_did_not_fit(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        found = self.judged(monkeypatch, tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{name})")
        assert not found.fits and found.images == 4
        assert found.reason == f"ended by {name}, as where memory runs out"

    def test_a_result_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        script = 'open(result, "w").write(\'{"bytes": 5000, "seconds": 0.25}\')'
        assert self.judged(monkeypatch, tmp_path, script) == Attempt(4, fits=True, bytes=5000, seconds=0.25)

    def test_a_trial_that_hangs_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        script = "open(result + '.pid', 'w').write(str(__import__('os').getpid())); __import__('time').sleep(60)"
        found = self.judged(monkeypatch, tmp_path, script, timeout=1.5)
        assert not found.fits and found.reason == "took longer than 1.5 s"
        pid = (tmp_path / "4.json.pid").read_text()
        assert not Path(f"/proc/{pid}").exists()

    def test_another_error_is_no_matter_of_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        script = 'open(result, "w").write(\'{"error": "ValueError: no such thing"}\')'
        with pytest.raises(RuntimeError, match=r"trial of 4 images failed: ValueError: no such thing \(see .*4.log\)"):
            self.judged(monkeypatch, tmp_path, script)
        (tmp_path / "4.json").unlink()
        with pytest.raises(RuntimeError, match=r"failed: SystemExit here"):
            self.judged(monkeypatch, tmp_path, "import sys; sys.exit('SystemExit here')")

    def test_errors_that_mean_memory(self):
        for text in (
            "DefaultCPUAllocator: can't allocate memory",
            "CUDA out of memory",
            "could not create a primitive",
        ):
            assert means_memory(RuntimeError(text))
        assert means_memory(MemoryError()) and means_memory(torch.OutOfMemoryError("x"))
        assert not means_memory(ValueError("out of memory")) and not means_memory(RuntimeError("shapes differ"))


def test_a_trial_keeps_what_takes_memory_alone(in_tmp: Path):
    cfg = detseg.load_config(*TINY, "features=[ema,freeze,accumulate]", "trainer.max_epochs=9", name="find")
    prepare(cfg, steps=2, accumulated=2)
    assert set(cfg.callbacks) == {"ema"} and cfg.logger is None
    assert (cfg.trainer.max_steps, cfg.trainer.accumulate_grad_batches, cfg.trainer.limit_val_batches) == (2, 2, 0)


def test_the_line_to_paste_keeps_the_images_per_step():
    assert override_line(40, wanted=16) == "data.batch_size=40"
    assert override_line(6, wanted=16) == "data.batch_size=6 trainer.accumulate_grad_batches=3"  # 18: the nearest
    assert override_line(5, wanted=16, accumulated=2) == "data.batch_size=5 trainer.accumulate_grad_batches=7"


def test_free_memory_is_a_number_of_bytes():
    assert 1e8 < batch_finder.free_memory() < 1e14
    cfg = OmegaConf.create({"trainer": {"accelerator": "cpu"}, "find": {"batch": {"memory_gb": 2.0, "margin": 0.25}}})
    assert batch_finder._memory_limit(cfg) == 1_500_000_000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_real_trials_within_a_limit(in_tmp: Path):
    """One that fits, and one that must not: 16 images of 1024 pixels in what is hardly enough to import torch."""
    told: list[Attempt] = []
    cfg = detseg.load_config("model=unet_small", *TINY, "find.batch.start=2", "find.batch.largest=2", name="find")
    found = find_batch(cfg, tell=told.append)
    assert found.images == 2 and [one.images for one in told] == [2]
    assert 2e8 < told[0].bytes < 2e10 and told[0].seconds > 0
    directory = next(in_tmp.rglob("batch_finder"))
    Worst((1024, 1024), found.worst.target, 1).save(directory / "worst.pt")
    full = try_size(16, directory, limit=int(1.5e9))
    assert not full.fits and full.reason != "" and signal.SIGTERM.name not in full.reason
    assert not (directory / "16.json").exists() or "memory" in json.loads((directory / "16.json").read_text())


def test_a_trial_is_on_the_first_of_the_named_devices():
    assert [first_device(devices) for devices in ("auto", -1, 4, "2")] == [1, 1, 1, 1]
    assert first_device([3, 1]) == first_device("3,1") == [3]
