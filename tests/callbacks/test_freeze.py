"""Freezing and thawing, seen in the weights after every step, alone and as one of several processes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from detseg.callbacks import Freeze
from tiny_task import TinyTask, fit


class BodyTask(TinyTask):
    """The tiny task with a body: a layer and a batch norm before the head; the optimiser has momentum and decay."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.model.head = nn.Linear(4, 2)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


class Watch(L.Callback):
    """Keeps, after every step, the body's weight, the head's, the norm's mean, and the gradients' norm when clipped."""

    def __init__(self) -> None:
        self.body: list[Tensor] = []
        self.head: list[Tensor] = []
        self.mean: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        model = pl_module.model
        self.body.append(model.backbone[0].weight.detach().clone())
        self.head.append(model.head.weight.detach().clone())
        self.mean.append(model.backbone[1].running_mean.clone())


class Several(Freeze):
    """What the callback does where it is one of several processes."""

    def _freeze(self, model: nn.Module, *, alone: bool) -> None:
        assert alone
        super()._freeze(model, alone=False)


def train(directory: Path, freeze: Freeze, *, epochs: int = 3, **settings: Any) -> tuple[BodyTask, Watch, L.Trainer]:
    torch.manual_seed(0)
    task, watch = BodyTask(), Watch()
    return task, watch, fit(task, directory, freeze, watch, epochs=epochs, **settings)


def same(values: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in pairwise(values)]


@pytest.mark.parametrize("kind", [Freeze, Several])
def test_weights_and_statistics_stand_still_until_the_epoch(kind: type[Freeze], tmp_path: Path):
    task, watch, trainer = train(tmp_path, kind(until_epoch=2))  # 6 steps an epoch
    assert all(same(watch.body[:12])) and not any(same(watch.body[11:]))
    assert all(same(watch.mean[:12])) and not any(same(watch.mean[11:]))
    assert not any(same(watch.head))
    assert torch.equal(watch.mean[0], torch.zeros(4))  # as it was built, though it saw 12 batches
    assert all(value.requires_grad for value in task.parameters()) and task.model.backbone[1].training
    (group,) = trainer.optimizers[0].param_groups
    assert len(group["params"]) == 6  # from the start: nothing was added


def test_several_processes_train_as_one(tmp_path: Path):
    """Dropping gradients is to needing none as far as any weight can tell, clipping included."""
    alone = train(tmp_path, Freeze(until_epoch=1), epochs=2, gradient_clip_val=0.05)[1]
    several = train(tmp_path, Several(until_epoch=1), epochs=2, gradient_clip_val=0.05)[1]
    assert len(alone.head) == 12
    for ours, theirs in zip([*alone.head, *alone.body], [*several.head, *several.body], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [Freeze, Several])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_thaws_in_the_same_epoch(kind: type[Freeze], stop: int, tmp_path: Path):
    """Stopped before, at and after the thaw (epoch 2), all weights end bitwise as those of the unbroken run."""
    whole = train(tmp_path, kind(until_epoch=2), epochs=4)[1]
    _, first, trainer = train(tmp_path, kind(until_epoch=2), epochs=stop)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    task, rest = BodyTask(), Watch()
    built = L.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[kind(until_epoch=2), rest], default_root_dir=tmp_path,
    )  # fmt: skip
    built.fit(task, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert len(first.body) + len(rest.body) == len(whole.body) == 24
    for ours, theirs in zip([*first.body, *rest.body], whole.body, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(rest.mean[-1], whole.mean[-1]) and torch.equal(rest.head[-1], whole.head[-1])


def test_validation_leaves_frozen_norms_in_eval_mode(tmp_path: Path):
    modes: list[tuple[bool, bool]] = []

    class Modes(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            modes.append((pl_module.model.backbone[1].training, pl_module.model.head.training))

    fit(BodyTask(), tmp_path, Freeze(until_epoch=1), Modes(), epochs=2, val_check_interval=2)
    assert modes[:6] == [(False, True)] * 6 and modes[6:] == [(True, True)] * 6


def test_parts_are_whole_names(tmp_path: Path):
    freeze = Freeze(parts=["head"], until_epoch=5)
    _, watch, _ = train(tmp_path, freeze, epochs=1)
    assert all(same(watch.head)) and not any(same(watch.body))
    with pytest.raises(
        ValueError, match=r"no trained parameter lies below 'hea'; the model's parts are backbone, head"
    ):
        train(tmp_path, Freeze(parts=["hea"]))
    with pytest.raises(ValueError, match="hold all 6 parameters: nothing is trained"):
        train(tmp_path, Freeze(parts=["head", "backbone"]))
    with pytest.raises(ValueError, match="until_epoch is -1"):
        Freeze(until_epoch=-1)


def test_what_was_never_trained_stays_so(tmp_path: Path):
    class Half(BodyTask):
        def __init__(self) -> None:
            super().__init__()
            self.model.backbone[0].requires_grad_(False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=0.1)

    task = Half()
    fit(task, tmp_path, Freeze(until_epoch=1), epochs=2)
    assert [value.requires_grad for value in task.model.parameters()] == [False, False, True, True, True, True]


@pytest.mark.parametrize("kind", [Freeze, Several])
def test_weights_learn_first_and_are_held_from_an_epoch_on(kind: type[Freeze], tmp_path: Path):
    _, watch, _ = train(tmp_path, kind(from_epoch=1, until_epoch=None))  # 6 steps an epoch
    assert not any(same(watch.body[:6])) and all(same(watch.body[5:]))
    assert not any(same(watch.mean[:6])) and all(same(watch.mean[5:]))
    assert not any(same(watch.head))


def test_epochs_that_do_not_follow_each_other_are_refused():
    with pytest.raises(ValueError, match="from_epoch is 3 and until_epoch 2"):
        Freeze(from_epoch=3, until_epoch=2)
    with pytest.raises(ValueError, match="from_epoch is -1"):
        Freeze(from_epoch=-1)
