"""The base of every data module: splits in, batches out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Sampler

from detseg.data.check import DataError, Report, both_lists, check_classes
from detseg.data.loader import LateLoader, calm_worker
from detseg.data.parcel import ship
from detseg.data.proposals import ProposedDataset
from detseg.data.sample import Sample, SampleDataset, collate, empty_batch
from detseg.data.samplers import EvalSampler, TrainSampler
from detseg.data.split import TransformedSplit
from detseg.data.transforms import Recipe
from detseg.data.watch import Watch
from detseg.ops.proposer import Proposer
from detseg.structures import Batch

log = logging.getLogger(__name__)

TRUTHS = ("boxes", "instances", "semantic")
"""What a target holds: boxes alone, boxes and instance masks, or a class for every pixel."""


class DetectionData(L.LightningDataModule):
    """Loads splits as batches; a subclass says in :meth:`read` where samples come from.

    The same seed gives the same batches in the same order, whatever the number of workers. Images stay uint8 until
    they are on the device. In evaluation every image is loaded once, on one rank.

    Args:
        truth: ``boxes``, ``instances`` (adds masks) or ``semantic`` (adds a map of classes).
        num_classes: checked against the files; ``None`` takes what they have.
        class_names: names per label, checked against the files (readers may select by them); ``None`` takes theirs.
        train_transform: recipe for training samples, (image, target) -> (image, target); ``None``: none.
        eval_transform: recipe for evaluation samples.
        batch_size: images per training step and process.
        eval_batch_size: images per evaluation step; ``None`` takes ``batch_size``.
        num_workers: processes that load and transform; 0 does it in the main process.
        size_divisor: batches are padded to multiples of this many pixels.
        seed: of the order of training images and of the augmentation.
        drop_last: leave out a last, smaller training batch (other images each epoch), unless it is the only one.
        pin_memory: page-locked batches, which copy faster to a GPU; ``None``: where a trainer uses one.

    Raises:
        DataError: from the first use of the files: they disagree with what was asked for, or cannot be repaired.
    """

    splits: tuple[str, ...] = ("train", "val", "test")
    """The splits that this data set has."""

    def __init__(
        self,
        *,
        truth: str = "boxes",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        size_divisor: int = 32,
        seed: int = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if truth not in TRUTHS:
            raise ValueError(f"data.truth={truth!r} is unknown; choose one of {', '.join(TRUTHS)}")
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1) or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size}, eval_batch_size={eval_batch_size} must be at least 1, "
                f"num_workers={num_workers} at least 0"
            )
        if isinstance(train_transform, Recipe) and train_transform.augment is not None:
            train_transform.augment.check_truth(truth)
        self.truth, self.seed = truth, seed
        self.wanted_classes, self.wanted_names = num_classes, None if class_names is None else list(class_names)
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers, self.size_divisor, self.drop_last = num_workers, size_divisor, drop_last
        self.pin_memory = pin_memory
        self.proposer: Proposer | None = None
        """Makes the regions that the model looks at, where it does not make its own: every sample and batch then has
        proposals, kept on disk. ``detseg.build`` sets it."""
        self.last_batch: Batch | None = None
        """The batch of the step that runs or ran last, as the loader gave it, in host memory."""
        self._read: dict[str, SampleDataset] = {}
        self._proposed: dict[str, ProposedDataset] = {}

    def read(self, split: str) -> SampleDataset:
        """Return the untransformed samples of ``split``; subclasses override this. Called once per split."""
        raise NotImplementedError(f"{type(self).__name__} must override read(split)")

    def dataset(self, split: str) -> SampleDataset:
        """Return the checked, untransformed samples of ``split``, read on first use.

        Raises:
            DataError: there is no such split, it is empty, or its classes differ from those asked for or from those of
                another split.
        """
        if split not in self._read:
            if split not in self.splits:
                raise DataError(f"{self._owner} has no split {split!r}; it has {', '.join(self.splits)}")
            self._read[split] = self._checked(split, self.read(split))
        return self._read[split]

    def samples(self, split: str) -> SampleDataset:
        """Return the samples of ``split`` as loaders read them: with a ``proposer``, with their proposals."""
        samples = self.dataset(split)
        if self.proposer is None:
            return samples
        known = self._proposed.get(split)
        if known is None or known.proposer is not self.proposer:
            known = self._proposed[split] = ProposedDataset(samples=samples, proposer=self.proposer, name=split)
        return known

    def fill_proposals(self, split: str) -> None:
        """Make the missing proposals of ``split``, unless the trainer looks at a few images alone; see ``samples``.

        Does nothing without a ``proposer``. Proposals that are missing later are made where they are missed.
        """
        samples = self.samples(split)
        if isinstance(samples, ProposedDataset) and not _samples_few(self.trainer, split):
            rank, world_size = self._ranks()
            samples.fill(workers=self.num_workers, rank=rank, world_size=world_size)

    @property
    def class_names(self) -> list[str]:
        """One name per label 0..K-1; for ``truth="semantic"`` stuff and background are among them."""
        return list(self._any_split().class_names)

    @property
    def num_classes(self) -> int:
        """How many classes the files have, as ``truth`` counts them."""
        return len(self.class_names)

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of each label."""
        return [int(number) for number in self._any_split().category_ids]

    @property
    def report(self) -> dict[str, Report]:
        """What the check found, for every split read so far from files."""
        reports = {split: getattr(samples, "report", None) for split, samples in self._read.items()}
        return {split: report for split, report in reports.items() if report is not None}

    def setup(self, stage: str | None = None) -> None:
        """Read and check the splits that ``stage`` (fit, validate, test, predict; ``None``: all) needs.

        With a ``proposer`` their proposals are made too.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in self.splits if stage is None else needed.get(stage, ()):
            if split in self.splits:
                self.fill_proposals(split)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled, augmented training batches; the order depends on (seed, epoch) alone.

        Raises:
            ValueError: augmentation is to be closed for the last epochs of a training without end.
        """
        samples = self.samples("train")
        rank, world_size = self._ranks()
        sampler = TrainSampler(
            length=len(samples), seed=self.seed, rank=rank, world_size=world_size, batch_size=self.batch_size
        )
        split = TransformedSplit(samples=samples, transform=self.train_transform, seed=self.seed, name="train")
        loader = self._loader(
            split, sampler, self.batch_size, drop_last=self.drop_last and len(sampler) > self.batch_size
        )
        if self.trainer is not None:
            split.epochs = planned_epochs(self.trainer, batches=len(loader))
            self._check_closing(split.epochs)
        return loader

    def eval_dataloader(self, split: str) -> DataLoader[Sample]:
        """Return the batches of ``split`` in order, with ``truths``; under DDP each image is on one rank only.

        A rank for which there is no image gets a batch of none.
        """
        samples = self.samples(split)
        rank, world_size = self._ranks()
        sampler = EvalSampler(length=len(samples), rank=rank, world_size=world_size)
        if not len(sampler):  # Lightning would leave out this rank's evaluation, and the others wait for its figures
            return DataLoader(cast(Any, [self._no_images()]), batch_size=None)
        transformed = TransformedSplit(samples=samples, transform=self.eval_transform, with_truth=True, name=split)
        return self._loader(transformed, sampler, self.eval_batch_size, drop_last=False)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation split in order."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test split in order."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return the test split, or where there is none the validation split, in order."""
        return self.eval_dataloader("test" if "test" in self.splits else "val")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Keep hold of the batch until the next, for messages and replays."""
        self.last_batch = batch
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch without waiting for each of its tensors, as Lightning would: it knows tensors alone."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 images into float in [0, 1], on the device that they are on by now."""
        if batch.images.dtype != torch.uint8:
            return batch
        return replace(batch, images=batch.images.float() / 255)

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _checked(self, split: str, samples: SampleDataset) -> SampleDataset:
        names = list(samples.class_names)
        check_classes(
            source=f"{self._owner}, split {split}",
            found=names,
            wanted=self.wanted_names,
            num_classes=self.wanted_classes,
        )
        for other, known in self._read.items():
            if list(known.class_names) != names or list(known.category_ids) != list(samples.category_ids):
                raise DataError(
                    f"{self._owner}: splits {other} and {split} define different classes: "
                    f"{list(zip(known.category_ids, known.class_names, strict=True))} and "
                    f"{list(zip(samples.category_ids, names, strict=True))}"
                )
        if len(samples) == 0:
            raise DataError(f"{self._owner}: split {split} has no images. {both_lists(self.wanted_names, names)}")
        report: Report | None = getattr(samples, "report", None)
        if report is not None:
            _tell(report)
        return samples

    def _any_split(self) -> SampleDataset:
        return next(iter(self._read.values())) if self._read else self.dataset(self.splits[0])

    def _uses_gpu(self) -> bool:
        """Say whether the trainer does; pinning on a CPU would start CUDA, which takes room on a GPU of others."""
        strategy = getattr(self.trainer, "strategy", None)
        return strategy is not None and bool(strategy.root_device.type == "cuda")

    def _check_closing(self, epochs: int | None) -> None:
        augment = self.train_transform.augment if isinstance(self.train_transform, Recipe) else None
        if epochs is None and augment is not None and augment.heavy and augment.close_epochs:
            raise ValueError(
                f"augment.close_epochs={augment.close_epochs} counts from the end of training, which has none: give "
                "trainer.max_epochs or trainer.max_steps, or close_epochs=0"
            )

    def _no_images(self) -> Batch:
        return empty_batch(self.size_divisor, proposals=self.proposer is not None)

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(
        self, split: TransformedSplit, sampler: Sampler[Any], batch_size: int, *, drop_last: bool
    ) -> DataLoader[Sample]:
        split.samples.prepare()
        if self.num_workers:
            split.watch = Watch(workers=self.num_workers, split=split.name, file_of=split.samples.file_of)
        pack = partial(collate, size_divisor=self.size_divisor)
        return LateLoader(
            split,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=partial(ship, pack) if self.num_workers else pack,
            worker_init_fn=calm_worker,
            pin_memory=self._uses_gpu() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # of its own: drawing from the global one would tie
            # the weights' random numbers to how often a loader was iterated
        )


def planned_epochs(trainer: L.Trainer, *, batches: int) -> int | None:
    """Return how many epochs a trainer is to train, a last part of one too; ``None``: it has no end known beforehand.

    Args:
        trainer: its limits of epochs, steps and batches count; a limit of time does not.
        batches: of one epoch and process.
    """
    own: Any = trainer  # Lightning gives these no types
    limit = getattr(own, "limit_train_batches", 1.0)
    batches = max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))
    ends = [own.max_epochs] if (getattr(own, "max_epochs", None) or -1) >= 0 else []
    steps = getattr(own, "max_steps", -1)
    if steps >= 0:
        per_epoch = -(-batches // own.accumulate_grad_batches)  # the last step of an epoch may have fewer batches
        ends.append(-(-steps // per_epoch))
    return min(ends) if ends else None


def _samples_few(trainer: L.Trainer | None, split: str) -> bool:
    """Say whether a trainer stops after a few batches of a split, as for a quick look."""
    if trainer is None:
        return False
    own: Any = trainer  # Lightning gives these no types
    limit = getattr(own, f"limit_{split}_batches", 1.0)
    return bool(own.fast_dev_run or own.overfit_batches or limit != 1.0)


@rank_zero_only
def _tell(report: Report) -> None:
    log.log(logging.INFO if report.clean else logging.WARNING, "%s", report)
