"""What all tasks share, seen through real Lightning runs of models that know nothing."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.structures import Detections, SemanticMap, Target
from detseg.tasks import Detection
from detseg.tasks.base import Task, per_class, restore, scalars
from detseg.tasks.schedules import WarmupCosine
from fake_models import FakeDetector, FakeSegmenter, batch, boxes, loader, trainer

NAMES = ["apple", "pear"]


def target(image_id: int, *rows: tuple[float, float, float, float], size: tuple[int, int] = (16, 16)) -> Target:
    return Target(boxes=boxes(*rows), labels=torch.zeros(len(rows), dtype=torch.int64), image_id=image_id, size=size)


def found(*rows: tuple[float, float, float, float]) -> Detections:
    count = len(rows)
    return Detections(boxes(*rows), torch.linspace(0.9, 0.5, count), torch.zeros(count, dtype=torch.int64))


def make(model: nn.Module | None = None, **settings: Any) -> Detection:
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5), "monitor": "val/map"} | settings
    return Detection(model=model or FakeDetector(), class_names=NAMES, **settings)


class TestSteps:
    def test_logs_every_loss_term_and_their_sum(self, tmp_path: Path):
        task, runner = make(), trainer(tmp_path)
        data = batch([target(1, (0, 0, 8, 8))])
        runner.fit(task, loader(data, data), loader(data))
        logged = runner.callback_metrics
        assert {"train/loss", "train/loss_classification", "train/loss_box", "train/positives_p3"} <= set(logged)
        assert_close(logged["train/loss"], logged["train/loss_classification"] + logged["train/loss_box"])
        assert_close(logged["val/loss"], logged["val/loss_classification"] + logged["val/loss_box"])
        assert float(logged["train/positives_p3"]) == 1

    def test_train_figures_are_logged_when_due_only(self, tmp_path: Path):
        task, calls = make(), []
        plain = task.train_row.add
        task.train_row.add = lambda *given: (calls.append((task.global_step, *given[1])), plain(*given))  # type: ignore
        runner = trainer(tmp_path, log_every_n_steps=3, limit_val_batches=0)
        runner.fit(task, loader(*[batch([target(1)])] * 7))
        assert [(step, name) for step, name, *_ in calls] == [(2, "train/loss"), (5, "train/loss")]

    def test_losses_of_uneven_batches_are_averaged_per_image(self, tmp_path: Path):
        task, runner = make(), trainer(tmp_path)
        task.model.diagnostics = lambda outputs, targets: {"n": torch.tensor(float(len(targets)))}  # type: ignore
        first, second = batch([target(1), target(2), target(3)]), batch([target(4)])
        logged = runner.validate(task, loader(first, second), verbose=False)[0]
        assert logged["val/n"] == pytest.approx((3 * 3 + 1 * 1) / 4)

    def test_a_loss_that_is_not_finite_stops_with_its_terms_and_images(self, tmp_path: Path):
        task = make(FakeDetector(bad=True))
        with pytest.raises(FloatingPointError, match=r"step 0 .*loss_classification nan, loss_box .* images 41.*lower"):
            trainer(tmp_path).fit(task, loader(batch([target(41)])))

    def test_channels_last_refuses_the_convolution_that_crashes_a_cpu(self, tmp_path: Path):
        """Of RepVGG's stem: the gradient of its weights corrupts memory in oneDNN."""
        for channels, refused in ((3, True), (8, False)):
            model = FakeDetector()
            model.shortcut = nn.Conv2d(channels, 4, 1, stride=2)
            task = make(model, channels_last=True)
            if refused:
                with pytest.raises(ValueError, match=r"layer shortcut is a 1x1 .* on 3 channels"):
                    trainer(tmp_path).fit(task, loader(batch([target(1)])))
            else:
                trainer(tmp_path).fit(task, loader(batch([target(1)])))

    def test_predictions_that_are_not_finite_are_named_by_their_images(self, tmp_path: Path):
        task = make(FakeDetector())
        task.model.predict = lambda *_: [  # type: ignore[method-assign]
            Detections(boxes((0, 0, float("nan"), 8)), torch.ones(1), torch.zeros(1, dtype=torch.int64))
        ]
        with pytest.raises(ValueError, match=r"box 0 is \[0.0, 0.0, nan, 8.0\].*; predicted for .* images 41$"):
            trainer(tmp_path).validate(task, loader(batch([target(41)])), verbose=False)

    def test_evaluation_samples_alike_and_leaves_trainings_random_numbers_alone(self):
        """Two-stage losses draw samples: the figure must not depend on what ran before, nor training on validation."""
        task, seen = make(), []
        task.mean_rows["val"].add = lambda figures, images: seen.append(float(figures["loss_box"]))  # type: ignore
        plain = task.model.loss
        task.model.loss = lambda *given: plain(*given) | {"loss_box": torch.rand(())}  # type: ignore[method-assign]
        state = torch.get_rng_state()
        for index in (0, 1, 0):
            task.validation_step(batch([target(index)]), index)
        assert seen[0] == seen[2] != seen[1]
        assert torch.equal(torch.get_rng_state(), state)

    def test_channels_last_changes_the_layout_alone(self):
        plain, last = make(), make(channels_last=True)
        last.model.load_state_dict(plain.model.state_dict())
        images = torch.rand(2, 3, 16, 16)
        assert last.model.backbone["body"].weight.is_contiguous(memory_format=torch.channels_last)
        outputs = [task.model(images.contiguous(memory_format=task.layout)).scores for task in (plain, last)]
        assert_close(outputs[0], outputs[1])

    def test_steps_return_predictions_in_the_photos_own_pixels(self):
        task = make(FakeDetector(answer=found((0, 0, 8, 4))))
        task.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        data = batch([target(1)], [target(1, size=(32, 48))])
        assert_close(task.validation_step(data, 0)[0].boxes, boxes((0, 0, 24, 8)))
        assert_close(task.predict_step(data, 0)[0].boxes, boxes((0, 0, 24, 8)))
        assert_close(task(data)[0].boxes, boxes((0, 0, 8, 4)))


class TestFigures:
    def test_counts_once_per_epoch_and_starts_anew(self, tmp_path: Path):
        """One of two objects found: AP of the class is (51 of 101 recall points) = 0.505 at every IoU."""
        task, runner = make(FakeDetector(answer=found((0, 0, 8, 8)))), trainer(tmp_path)
        data = loader(batch([target(1, (0, 0, 8, 8))]), batch([target(2, (0, 0, 8, 8), (9, 9, 15, 15))]))
        for _ in range(2):
            logged = runner.validate(task, data, verbose=False)[0]
            assert logged["val/map_50"] == pytest.approx(67 / 101)  # 2 of 3 objects, without a false positive
        assert task.results["val"]["count"] == 3
        assert "val/count" not in logged

    def test_what_has_no_object_is_not_logged_but_kept_as_nan(self, tmp_path: Path):
        task, runner = make(FakeDetector(answer=found((0, 0, 8, 8)))), trainer(tmp_path)
        logged = runner.validate(task, loader(batch([target(1, (0, 0, 8, 8))])), verbose=False)[0]
        assert logged["val/map/apple"] == 1 and "val/map/pear" not in logged and "val/map_large" not in logged
        assert math.isnan(task.results["val"]["map/pear"]) and math.isnan(task.results["val"]["map_large"])

    def test_the_monitored_figure_is_always_there(self, tmp_path: Path):
        logged = trainer(tmp_path).validate(make(), loader(batch([target(1)])), verbose=False)[0]
        assert math.isnan(logged["val/map"])

    def test_test_split_has_its_own_figures(self, tmp_path: Path):
        task = make(FakeDetector(answer=found((0, 0, 8, 8))))
        logged = trainer(tmp_path).test(task, loader(batch([target(1, (0, 0, 8, 8))])), verbose=False)[0]
        assert logged["test/map"] == 1 and "val" not in task.results
        assert not [name for name in logged if not name.startswith("test/")]

    def test_scalars_leave_tensors_and_names_out(self):
        values = {"map": torch.tensor(0.5), "map_per_class": torch.tensor([0.1, 0.9])}
        assert scalars(values, "mask_") == {"mask_map": 0.5}
        assert per_class(values["map_per_class"], NAMES, "map") == pytest.approx({"map/apple": 0.1, "map/pear": 0.9})


class TestRestore:
    def test_each_image_has_its_own_scale(self):
        data = batch([target(1), target(2)], [target(1, size=(8, 32)), target(2, size=(0, 0))])
        first, second = restore([found((0, 0, 8, 8)), found((0, 0, 8, 8))], data)
        assert_close(first.boxes, boxes((0, 0, 16, 4)))
        assert_close(second.boxes, boxes((0, 0, 8, 8)))

    def test_maps_take_the_nearest_label(self):
        data = batch([target(1)], [target(1, size=(32, 32))])
        answer = SemanticMap(torch.arange(16).div(8, rounding_mode="floor").repeat(16, 1))
        grown = restore([answer], data)[0]
        assert grown.size == (32, 32) and grown.labels.sum() == 32 * 16

    def test_without_truths_nothing_changes(self):
        assert restore([found((0, 0, 8, 8))], batch([target(1)]))[0].boxes[0, 2] == 8


class TestOptimiser:
    def groups(self, **settings: Any) -> dict[str, dict[str, Any]]:
        return {group["name"]: group for group in make(**settings).parameter_groups()}

    def test_norms_and_biases_do_not_decay(self):
        groups = self.groups()
        assert sorted(groups) == ["rest", "rest_no_decay"]
        assert groups["rest_no_decay"]["weight_decay"] == 0 and "weight_decay" not in groups["rest"]
        assert [value.ndim for value in groups["rest_no_decay"]["params"]] == [1] * 5  # three biases, norm's two
        assert [value.ndim for value in groups["rest"]["params"]] == [4, 4, 2]

    def test_body_has_its_own_rate(self):
        groups = self.groups(backbone_lr_scale=0.25)
        assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
            {"body": 0.025, "body_no_decay": 0.025, "rest": 0.1, "rest_no_decay": 0.1}
        )
        assert len(groups["body"]["params"]) == 1 and len(groups["rest"]["params"]) == 2  # the pyramid is no body

    def test_everything_decays_if_asked(self):
        assert sorted(self.groups(decay_one_dimensional=True)) == ["rest"]

    def test_frozen_parameters_are_in_no_group(self):
        model = FakeDetector()
        model.backbone.requires_grad_(False)
        assert sum(len(group["params"]) for group in make(model).parameter_groups()) == 4

    def test_a_scale_without_a_backbone_is_an_error(self):
        task = Detection(
            model=FakeSegmenter(num_classes=2),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            class_names=NAMES,
            monitor="val/map",
            backbone_lr_scale=0.1,
        )
        with pytest.raises(ValueError, match=r"backbone_lr_scale is 0.1.*2 parameters.*1.0"):
            task.parameter_groups()

    def test_schedule_spans_the_whole_training(self, tmp_path: Path):
        rates: list[float] = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        schedule = partial(WarmupCosine, warmup_steps=2, start=0.5, end=0.1)
        runner = trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[Watch()])
        runner.fit(make(scheduler=schedule), loader(*[batch([target(1)])] * 3))
        assert rates[:3] == pytest.approx([0.05, 0.075, 0.1]) and rates[-1] == pytest.approx(0.01)
        assert len(rates) == 6


class TestConstruction:
    def test_class_counts_must_agree(self):
        with pytest.raises(ValueError, match=r"model has 3 classes, but 2 names are given: apple, pear"):
            make(FakeDetector(num_classes=3))

    def test_mode_is_checked(self):
        with pytest.raises(ValueError, match="mode is 'best'"):
            make(mode="best")

    def test_base_says_nothing_about_figures(self):
        with pytest.raises(NotImplementedError):
            Task(model=FakeDetector(), optimizer=torch.optim.SGD, class_names=NAMES, monitor="val/map")

    def test_checkpoint_holds_plain_values_alone(self, tmp_path: Path):
        runner = trainer(tmp_path, limit_val_batches=0)
        task = make(scheduler=partial(WarmupCosine, warmup_steps=1))
        runner.fit(task, loader(batch([target(1)])))
        runner.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert all(name.startswith("model.") for name in saved["state_dict"])
        assert_close(saved["state_dict"]["model.head.weight"], task.model.head.weight.detach())
