"""Training that goes on bit for bit, from wherever a checkpoint was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from detseg.callbacks import Freeze
from detseg.data import DetectionTrain
from detseg.data.augment import Augment
from noisy_run import fit
from noisy_run import task as make_task


class SaveAt(Checkpoint):
    """Saves ``here.ckpt`` when ``hook`` is called for the ``count``-th time, after all other callbacks."""

    def __init__(self, directory: Path, hook: str, count: int) -> None:
        self.path, self.left, self.lines = directory / "here.ckpt", count, 0
        setattr(self, hook, self._called)

    def _called(self, trainer: L.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


HOOKS = {
    "after a step in mid-epoch": ("on_train_batch_end", 8),
    "after the first step": ("on_train_batch_end", 1),
    "after the last step of an epoch": ("on_train_batch_end", 10),
    "after the very last step": ("on_train_batch_end", 15),
    "before a step in mid-epoch": ("on_train_batch_start", 8),
    "before the first step of an epoch": ("on_train_batch_start", 6),
    "before the first step": ("on_train_batch_start", 1),
    "in validation": ("on_validation_batch_end", 5),
    "at the start of validation": ("on_validation_batch_start", 4),
    "at the end of validation": ("on_validation_end", 2),
    "at the end of the last validation": ("on_validation_end", 3),
    "at an epoch's end": ("on_train_epoch_end", 2),
    "at an epoch's start": ("on_train_epoch_start", 2),
}


def resume_from(directory: Path, hook: str, count: int, **options: Any) -> tuple[list[str], list[str]]:
    """Return what the whole run did and what the resumed one did; both end with checksums."""
    saver = SaveAt(directory, hook, count)
    whole, task, trainer = fit(directory, saver, **options)
    rest, resumed, other = fit(directory, resume=saver.path, **{**options, "data": None})
    for lines, module, used in ((whole, task, trainer), (rest, resumed, other)):
        averages = used.callbacks[0]._average_model.state_dict()  # type: ignore[attr-defined]
        lines.extend(f"{name} {value.double().sum()}" for name, value in sorted(averages.items()))
        lines.append(str(sorted(module.results["val"].items(), key=str)))
        lines.append(f"best {used.checkpoint_callback.best_model_score}")  # type: ignore[union-attr]
    return whole, rest


@pytest.mark.parametrize("place", HOOKS)
def test_goes_on_bit_for_bit_from_wherever_it_was_saved(place: str, tmp_path: Path):
    hook, count = HOOKS[place]
    whole, rest = resume_from(tmp_path, hook, count)
    assert len([line for line in whole if line.startswith(("step", "val", "epoch"))]) == 15 + 3 + 3
    assert rest == whole[len(whole) - len(rest) :]


@pytest.mark.parametrize(
    ("hook", "count"), [("on_train_batch_end", 4), ("on_train_epoch_end", 1), ("on_train_batch_end", 8)]
)
def test_goes_on_bit_for_bit_across_the_thaw(hook: str, count: int, tmp_path: Path):
    """The body learns from the second epoch on; its five batches of the first are before, within and after."""
    saver = SaveAt(tmp_path, hook, count)
    whole, task, _ = fit(tmp_path, Freeze(until_epoch=1), saver)
    rest, resumed, _ = fit(tmp_path, Freeze(until_epoch=1), resume=saver.path)
    assert rest == whole[len(whole) - len(rest) :] and len(rest) < len(whole)
    start = dict(make_task().model.named_parameters())
    for name, value in task.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])
        assert not torch.equal(value, start[name]), f"{name} has learnt by the end"


@pytest.mark.parametrize(("hook", "count"), [("on_train_batch_end", 8), ("on_train_epoch_end", 2)])
def test_goes_on_bit_for_bit_with_several_images_and_sizes_and_across_the_closing(
    hook: str, count: int, tmp_path: Path
):
    """Mosaics in the first two epochs of three; the run has two workers, the resumed one none."""
    augment = Augment(mosaic=0.7, mixup=0.5, close_epochs=1, multi_scale=[1.0, 2.0, 3.0], multi_scale_every=1)
    data = {"train_transform": DetectionTrain(scale=(0.5, 1.5), augment=augment)}
    saver = SaveAt(tmp_path, hook, count)
    whole, task, _ = fit(tmp_path, saver, data=data | {"num_workers": 2})
    rest, resumed, _ = fit(tmp_path, resume=saver.path, data=data)
    assert rest == whole[len(whole) - len(rest) :] and 0 < len(rest) < len(whole)
    for name, value in task.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, int]]]] = {
    "two validations an epoch": (
        {"val_check_interval": 2},
        {
            "step": ("on_train_batch_end", 7),
            "validation": ("on_validation_batch_end", 8),
            "start": ("on_train_batch_start", 8),
        },
    ),
    "a validation every second epoch": (
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {"step": ("on_train_batch_end", 10), "last": ("on_train_batch_end", 15), "end": ("on_train_epoch_end", 3)},
    ),
    "a validation every seven steps": (
        {"val_check_interval": 7, "check_val_every_n_epoch": None},
        {
            "step": ("on_train_batch_end", 7),
            "validation": ("on_validation_batch_end", 4),
            "end": ("on_train_epoch_end", 2),
        },
    ),
    "three batches a step": (
        {"accumulate_grad_batches": 3},
        {
            "half": ("on_train_batch_end", 7),
            "start": ("on_train_batch_start", 8),
            "validation": ("on_validation_batch_end", 4),
        },
    ),
    "three batches a step, validated in between": (
        {"accumulate_grad_batches": 3, "val_check_interval": 2},
        {"validation": ("on_validation_batch_end", 4), "end": ("on_validation_end", 4)},
    ),
    "steps instead of epochs": (
        {"max_steps": 12, "max_epochs": -1, "val_check_interval": 2},
        {
            "step": ("on_train_batch_end", 7),
            "last": ("on_train_batch_end", 12),
            "end": ("on_train_epoch_end", 2),
            "validation": ("on_validation_batch_end", 8),
        },
    ),
    "steps that end with an epoch": ({"max_steps": 10, "max_epochs": -1}, {"last": ("on_train_batch_end", 10)}),
    "two workers, then none": ({"data": {"num_workers": 2}}, {"step": ("on_train_batch_end", 7)}),
}
PLACES = [(variant, place) for variant, (_, places) in VARIANTS.items() for place in places]


@pytest.mark.parametrize(("variant", "place"), PLACES)
def test_goes_on_bit_for_bit_with_other_steps_and_validations(variant: str, place: str, tmp_path: Path):
    options, places = VARIANTS[variant]
    whole, rest = resume_from(tmp_path, *places[place], **options)
    assert rest == whole[len(whole) - len(rest) :]
    assert any(line.startswith("step") for line in rest) or place in ("last", "validation")
