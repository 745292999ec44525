from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detseg.data import Coco, DetectionData, DetectionEval, DetectionTrain
from detseg.data.augment import Augment
from detseg.data.check import DataError
from detseg.data.module import planned_epochs
from detseg.data.sample import Sample, SampleDataset
from detseg.structures import Batch, Target
from drawn_data import NAMES, scenes, write_coco


class Plain(SampleDataset):
    """``count`` images of 8 x 8 whose image id is their number."""

    category_ids = (1, 2)

    def __init__(self, count: int, names: tuple[str, ...] = ("a", "b")) -> None:
        self.count, self.class_names = count, names

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        target = Target(
            boxes=torch.tensor([[1.0, 1.0, 5.0, 6.0]]), labels=torch.tensor([1]), image_id=index, size=(8, 8)
        )
        return Sample(torch.full((3, 8, 8), index, dtype=torch.uint8), target)


class PlainData(DetectionData):
    def __init__(self, counts: dict[str, int], names: dict[str, tuple[str, ...]] | None = None, **options: Any) -> None:
        super().__init__(num_workers=options.pop("num_workers", 0), **options)
        self.counts, self.names, self.splits = counts, names or {}, tuple(counts)

    def read(self, split: str) -> Plain:
        return Plain(self.counts[split], self.names.get(split, ("a", "b")))


def ids(batches: Any) -> list[list[int]]:
    return [[target.image_id for target in batch.targets] for batch in batches]


def noisy(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), target


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    expected, found = (
        PlainData({"train": 10}, num_workers=number, batch_size=3, train_transform=noisy, seed=4, size_divisor=8)
        for number in (0, workers)
    )
    loaders = [data.train_dataloader() for data in (expected, found)]
    seen = []
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        pairs = list(zip(*loaders, strict=True))
        assert len(pairs) == 3
        for one, other in pairs:
            assert_close(one.images, other.images, rtol=0, atol=0)
            assert ids([one]) == ids([other])
        seen.append(torch.cat([one.images for one, _ in pairs]))
    assert not torch.equal(seen[0], seen[1])  # workers that outlive an epoch know the next


def test_global_random_numbers_do_not_depend_on_the_loader() -> None:
    states = []
    for workers in (0, 1):
        torch.manual_seed(3)
        list(PlainData({"train": 4}, num_workers=workers, batch_size=2, train_transform=noisy).train_dataloader())
        states.append(torch.rand(3))
    torch.manual_seed(3)
    assert_close(states[0], torch.rand(3), rtol=0, atol=0)
    assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_smaller_last_batch_is_left_out_in_training_alone() -> None:
    data = PlainData({"train": 7, "val": 7}, batch_size=3, eval_batch_size=4)
    assert [len(batch) for batch in ids(data.train_dataloader())] == [3, 3]
    assert ids(data.val_dataloader()) == [[0, 1, 2, 3], [4, 5, 6]]
    assert [len(batch) for batch in ids(PlainData({"train": 2}, batch_size=3).train_dataloader())] == [2]
    kept = PlainData({"train": 7}, batch_size=3, drop_last=False)
    assert [len(batch) for batch in ids(kept.train_dataloader())] == [3, 3, 1]
    assert sorted(chain.from_iterable(ids(kept.train_dataloader()))) == list(range(7))


def test_evaluation_carries_the_truth_in_the_photos_pixels() -> None:
    data = PlainData({"val": 2}, batch_size=2, eval_transform=DetectionEval(size=(16, 24)), size_divisor=16)
    (batch,) = data.val_dataloader()
    assert batch.images.shape == (2, 3, 16, 32) and batch.sizes.tolist() == [[16, 24]] * 2
    assert batch.targets[0].boxes.tolist() == [[3, 2, 15, 12]] and batch.truths[0].boxes.tolist() == [[1, 1, 5, 6]]
    assert batch.truths[0].size == (8, 8) and batch.targets[0].size == (16, 24)
    assert ids(data.predict_dataloader()) == [[0, 1]]  # no test split: the validation split


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_evaluation_without_padding(world_size: int) -> None:
    seen: list[int] = []
    trained: list[int] = []
    for rank in range(world_size):
        data = PlainData({"train": 7, "val": 7}, batch_size=2)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": world_size})()  # type: ignore[assignment]
        seen += chain.from_iterable(ids(data.val_dataloader()))
        trained.append(len(ids(data.train_dataloader())))
    assert sorted(seen) == list(range(7))
    assert len(set(trained)) == 1  # equally many steps, or DDP waits for ever


def test_images_become_float_after_the_transfer() -> None:
    data = PlainData({"train": 4}, batch_size=4, size_divisor=8)
    (batch,) = data.train_dataloader()
    batch.images[0] = 255
    floats = data.on_after_batch_transfer(batch, 0)
    assert batch.images.dtype == torch.uint8 and floats.images.dtype == torch.float32
    assert float(floats.images[0].min()) == float(floats.images.max()) == 1.0
    assert_close(floats.images, batch.images / 255)
    assert data.on_after_batch_transfer(floats, 0).images is floats.images


def test_classes_are_checked_against_what_was_asked_for_and_between_splits() -> None:
    assert PlainData({"train": 1}, num_classes=2, class_names=["a", "b"]).num_classes == 2
    with pytest.raises(DataError, match=r"num_classes=3 .* 2 classes.*wanted: not given; found: \['a', 'b'\]"):
        PlainData({"train": 1}, num_classes=3).setup("fit")
    with pytest.raises(DataError, match=r"wanted: \['a', 'c'\]; found: \['a', 'b'\]"):
        PlainData({"train": 1}, class_names=["a", "c"]).setup("fit")
    with pytest.raises(DataError, match=r"train and val define different classes.*'b'.*'c'"):
        PlainData({"train": 1, "val": 1}, {"val": ("a", "c")}).setup("fit")
    with pytest.raises(DataError, match=r"split train has no images.*wanted: not given; found: \['a', 'b'\]"):
        PlainData({"train": 0}).setup("fit")
    with pytest.raises(NotImplementedError, match="read"):
        DetectionData().dataset("train")


def test_setup_reads_what_a_stage_needs() -> None:
    read: list[str] = []

    class Noted(PlainData):
        def read(self, split: str) -> Plain:
            read.append(split)
            return super().read(split)

    data = Noted({"train": 2, "val": 2, "test": 2})
    assert data.category_ids == [1, 2] and read == ["train"]  # enough to build a model from
    data.setup("validate")
    assert read == ["train", "val"]
    data.setup()
    assert read == ["train", "val", "test"] and data.report == {}


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="truth='masks' is unknown; choose one of boxes, instances, semantic"):
        DetectionData(truth="masks")
    with pytest.raises(ValueError, match="batch_size=0"):
        DetectionData(batch_size=0)


def planned(batches: int = 10, **options: Any) -> int | None:
    defaults = {"max_epochs": -1, "max_steps": -1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
    return planned_epochs(cast(Any, SimpleNamespace(**{**defaults, **options})), batches=batches)


def test_how_many_epochs_a_trainer_plans() -> None:
    assert planned() is None and planned(max_epochs=None) is None
    assert planned(max_epochs=7) == 7
    assert planned(max_steps=20) == 2 and planned(max_steps=21) == 3
    assert planned(max_steps=21, max_epochs=2) == 2
    assert planned(max_steps=8, accumulate_grad_batches=3) == 2  # 4 steps an epoch, the last of one batch
    assert planned(max_steps=8, limit_train_batches=4) == 2 and planned(max_steps=8, limit_train_batches=0.4) == 2
    assert planned(max_steps=0) == 0


def test_closing_before_the_end_needs_an_end() -> None:
    recipe = DetectionTrain(augment=Augment(mosaic=1.0, close_epochs=2))
    data = PlainData({"train": 4}, batch_size=2, train_transform=recipe)
    assert data.train_dataloader().dataset.epochs is None  # type: ignore[attr-defined]  # nothing trains
    for epochs in (5, -1):
        place = {"global_rank": 0, "world_size": 1, "max_steps": -1, "accumulate_grad_batches": 1}
        data.trainer = cast(Any, SimpleNamespace(max_epochs=epochs, **place))
        if epochs > 0:
            assert data.train_dataloader().dataset.epochs == 5  # type: ignore[attr-defined]
        else:
            with pytest.raises(ValueError, match=r"augment.close_epochs=2 counts from the end .* trainer.max_epochs"):
                data.train_dataloader()


class Recorder(L.LightningModule):
    """Notes which images came in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[list[int]] = []
        self.validated: list[int] = []
        self.first: list[Tensor] = []

    def training_step(self, batch: Batch, number: int) -> Tensor:
        if number == 0:
            self.trained.append([])
            self.first.append(batch.images.sum())
        self.trained[-1] += [target.image_id for target in batch.targets]
        assert batch.images.dtype == torch.float32
        return self.layer(batch.images.mean().reshape(1)).sum()

    def validation_step(self, batch: Batch, number: int) -> None:
        assert batch.truths is not None
        self.validated += [truth.image_id for truth in batch.truths]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data: DetectionData, folder: Path, **options: Any) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def test_lightning_moves_the_epoch_on_and_leaves_the_samplers_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, scenes(6), split)
    runs = []
    for workers in (0, 1):
        recipe = DetectionTrain(size=(24, 32), scale=(0.6, 1.4), brightness=0.4)
        data = Coco(root=tmp_path, num_workers=workers, batch_size=2, train_transform=recipe, num_classes=3)
        runs.append(fit(data, tmp_path))
    for module in runs:
        assert [sorted(epoch) for epoch in module.trained] == [list(range(0, 60, 10))] * 2
        assert module.trained[0] != module.trained[1]
        assert module.validated == list(range(0, 60, 10)) * 2
    assert runs[0].trained == runs[1].trained
    assert_close(torch.stack(runs[0].first), torch.stack(runs[1].first), rtol=0, atol=0)
    overfit = fit(Coco(root=tmp_path, num_workers=0, batch_size=2), tmp_path, overfit_batches=1)
    assert [len(epoch) for epoch in overfit.trained] == [2, 2]


def test_what_the_check_found_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path, scenes())
    with caplog.at_level(logging.INFO, logger="detseg.data"):
        data = Coco(root=tmp_path, val=None, class_names=list(NAMES[:2]))
        data.setup("fit")
    assert "not asked for" in caplog.text and caplog.records[0].levelno == logging.WARNING
    assert data.report["train"].images == 4


def test_a_batch_goes_to_a_gpu_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks for that of tensors alone; a batch is a structure that moves its own."""
    data = PlainData({"train": 4}, batch_size=2)
    batch = next(iter(data.train_dataloader()))
    asked: list[bool] = []
    to = torch.Tensor.to

    def recorded(self: Tensor, device: Any, *, non_blocking: bool) -> Tensor:
        asked.append(non_blocking)
        return to(self, "meta")

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    moved = data.transfer_batch_to_device(batch, torch.device("cuda", 0), 0)
    data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert moved.images.device.type == "meta" and set(asked[: len(asked) // 2]) == {True}
    assert set(asked[len(asked) // 2 :]) == {False} and len(asked) > 4


def test_batches_are_pinned_where_the_trainer_has_a_gpu() -> None:
    """Not where there merely is one: pinning starts CUDA, which takes room on it."""
    data = PlainData({"train": 4}, batch_size=2)
    assert data.train_dataloader().pin_memory is False
    for kind in ("cpu", "cuda"):
        strategy = SimpleNamespace(root_device=torch.device(kind))
        data.trainer = cast(Any, SimpleNamespace(global_rank=0, world_size=1, strategy=strategy))
        assert data.train_dataloader().pin_memory is (kind == "cuda")
    data.pin_memory = False
    assert data.train_dataloader().pin_memory is False
