"""Composing and building: choices, nearest names, the allowlist, and what the data fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

import detseg
from detseg import config
from detseg.callbacks import CheckpointStamp
from detseg.config import ConfigError, check_targets, instantiate, load_config, run_id, slug

TINY = (
    "trainer=cpu",
    "data.train_images=4",
    "data.val_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("ckpt=runs/a/model=fcos,seed=2/best.ckpt", 'ckpt="runs/a/model=fcos,seed=2/best.ckpt"'),
        ("data.root=/é/x (1)", 'data.root="/é/x (1)"'),
        ('source=a"=.jpg', 'source="a\\"=.jpg"'),
        ("seed=1,2", "seed=1,2"),
        ("source=photos/*.jpg", "source=photos/*.jpg"),
        ("data.values={0: a", "data.values={0: a"),
        ("optimizer.lr=choice(1,", "optimizer.lr=choice(1,"),
        ("-m", "-m"),
    ],
)
def test_values_that_the_grammar_has_no_place_for_are_quoted(typed: str, read: str):
    assert config.quoted([typed]) == [read]


def test_a_path_of_any_letters_is_composed():
    path = "runs/x/model=a,seed=1/é (1).ckpt"
    assert load_config(f"init_from={path}").init_from == path


class TestChoices:
    """experiment > model > task > transform, and the command line above all."""

    def test_a_model_brings_its_task_and_the_task_its_truth_and_recipes(self):
        cfg = load_config("model=unet_small")
        assert cfg.truth == cfg.data.truth == "semantic"
        assert cfg.task._target_ == "detseg.tasks.SemanticSegmentation" and cfg.task.monitor == "val/miou"
        assert cfg.data.train_transform._target_.endswith("SemanticTrain")
        assert cfg.data.eval_transform._target_.endswith("SemanticEval")

    def test_default_is_fcos_small_on_orchard(self):
        cfg = load_config()
        assert cfg.name == "orchard-fcos_small" and cfg.truth == "boxes"
        assert cfg.model._target_.endswith("FCOS") and cfg.data._target_ == "detseg.data.Orchard"
        assert cfg.task.monitor == "val/map" and cfg.data.train_transform._target_.endswith("DetectionTrain")

    def test_an_experiment_chooses_and_the_command_line_wins(self):
        cfg = load_config("experiment=orchard_unet")
        assert cfg.truth == "semantic" and cfg.name == "orchard_unet"
        cfg = load_config("experiment=orchard_unet", "model=mask_rcnn_small", "optimizer=sgd", "optimizer.lr=0.5")
        assert cfg.truth == "instances" and cfg.optimizer.lr == 0.5 and cfg.optimizer._target_ == "torch.optim.SGD"

    def test_a_task_may_be_chosen_beside_its_model(self):
        cfg = load_config("model=unet_small", "task=instance", "transform/train@data.train_transform=detection")
        assert cfg.task._target_ == "detseg.tasks.InstanceSegmentation" and cfg.data.truth == "instances"
        assert cfg.data.train_transform._target_.endswith("DetectionTrain")

    def test_small_forms_inherit_from_the_papers_own(self):
        paper, small = load_config("model=unet"), load_config("model=unet_small")
        assert paper.model.width == 64 and small.model.width < 64
        assert paper.model.keys() == small.model.keys()

    @pytest.mark.parametrize("debug, batches", [("debug=default", 2), ("seed=1", None)])
    def test_debug_cuts_the_run_short(self, debug: str, batches: int | None):
        assert load_config(debug).trainer.limit_train_batches == batches

    def test_struct_mode_stays_on(self):
        with pytest.raises(ConfigAttributeError):
            load_config().trainer.max_epoch = 3

    def test_each_call_has_a_directory_of_its_own(self):
        first, second = load_config("name=a"), load_config("name=a")
        assert first.paths.output_dir == first.paths.output_dir != second.paths.output_dir
        assert Path(first.paths.output_dir).parent == Path("runs/a")
        assert first.callbacks.checkpoint.dirpath == f"{first.paths.output_dir}/checkpoints"


class TestNearestNames:
    @pytest.mark.parametrize(
        "override, said",
        [
            ("trainer.max_epoch=3", "no key 'trainer.max_epoch'. Did you mean trainer.max_epochs"),
            ("max_epochs=3", "no key 'max_epochs'. Did you mean trainer.max_epochs"),
            ("optimizer.learning_rate=3", "no key 'optimizer.learning_rate'"),
            ("model=fcoss_small", "no model=fcoss_small. Did you mean fcos_small"),
            ("modle=fcos_small", "no key 'modle'. Did you mean model"),
            ("data=orchid", "no data=orchid. Did you mean orchard?"),
            ("transform/train@data.train_transform=detections", "Did you mean detection? Choices: detection"),
        ],
    )
    def test_unknown_names_are_answered(self, override: str, said: str):
        with pytest.raises(ConfigError) as caught:
            load_config(override)
        assert said in str(caught.value)

    def test_every_fault_has_its_line(self):
        with pytest.raises(ConfigError) as caught:
            load_config("model=unet_small", "trainer.max_epoch=3", "data.batchsize=1", "seed=2")
        lines = str(caught.value).splitlines()
        assert len(lines) == 2 and "data.batch_size" in lines[1] and "seed" not in str(caught.value)

    def test_a_value_that_does_not_parse_is_an_error_too(self):
        with pytest.raises(ConfigError, match="override_grammar"):
            load_config("seed=[1,")

    def test_inside_a_run_of_hydras_nothing_is_disturbed(self):
        from hydra import compose, initialize_config_module

        with initialize_config_module("detseg.conf", version_base="1.3"):
            load_config("model=unet_small")
            with pytest.raises(ConfigError):
                load_config("nonsense=1")
            assert compose("predict", ["ckpt=a", "source=b"]).ckpt == "a"


class TestTargets:
    @pytest.mark.parametrize(
        "target",
        [
            "os.system",
            "builtins.eval",
            "detseg.config.re.sys.exit",
            "detseg.data.image.os.system",
            "torch.hub.load",
            "torch.nn.modules.module.torch.load",
            "detseg_evil.Thing",
            "numpy.save",
        ],
    )
    def test_what_lies_elsewhere_is_refused_wherever_it_hides(self, target: str):
        with pytest.raises(ConfigError, match=r"^model\.loss\.1: .*refused|^model\.loss\.1: .*has no"):
            check_targets({"loss": [{}, {"_target_": target}]}, path="model")

    @pytest.mark.parametrize(
        "target", ["torch.nn.ReLU", "torch.optim.AdamW", "lightning.Trainer", "detseg.tasks.OneStageDetection"]
    )
    def test_what_configs_need_is_allowed(self, target: str):
        check_targets({"_target_": target})

    def test_nothing_is_called_before_all_are_checked(self):
        node = OmegaConf.create(
            {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}, {"_target_": "os.getcwd"}]}
        )
        with pytest.raises(ConfigError, match=r"model\._args_\.1"):
            instantiate(node, path="model")

    def test_a_package_of_the_users_own(self):
        node = OmegaConf.create({"_target_": "tiny_models.Net", "a": 2})
        with pytest.raises(ConfigError, match="refused"):
            instantiate(node)
        with pytest.raises(ConfigError, match="allow: collections belongs to the standard library"):
            instantiate(OmegaConf.create({"_target_": "collections.Counter", "a": 2}), allow=["collections"])

    def test_an_argument_that_does_not_exist_names_the_key(self):
        with pytest.raises(ConfigError, match=r"(?s)^model.*widht"):
            instantiate(OmegaConf.create({"_target_": "torch.nn.Linear", "widht": 3}), path="model")

    def test_the_parts_own_errors_pass_as_they_are(self):
        node = OmegaConf.create(
            {"_target_": "detseg.tasks.schedules.OneCycle", "total_steps": 5, "optimizer": None, "warmup": 2.0}
        )
        with pytest.raises(ValueError, match=r"scheduler.warmup is 2.0"):
            instantiate(node, path="scheduler")

    def test_partials_wait_and_containers_are_plain(self):
        made = instantiate(load_config("model=unet_small").optimizer)
        optimizer = made([torch.nn.Parameter(torch.zeros(1))])
        assert isinstance(optimizer, torch.optim.AdamW)
        assert type(made.keywords["betas"]) is list


class TestBuild:
    def build(self, *overrides: str) -> config.Run:
        return detseg.build(load_config("model=unet_small", *TINY, *overrides))

    def test_the_data_say_how_many_classes(self, in_tmp: Path):
        cfg = load_config("model=unet_small", *TINY)
        run = detseg.build(cfg)
        assert cfg.data.num_classes is None and run.cfg.model.num_classes == 5 == run.task.model.num_classes
        assert run.task.class_names == ["sky", "grass", "apple", "pear", "orange"]
        assert isinstance(run.trainer, L.Trainer) and not list(in_tmp.iterdir())

    def test_the_stamp_receives_the_resolved_config(self, in_tmp: Path):
        run = self.build()
        stamp = next(item for item in run.trainer.callbacks if isinstance(item, CheckpointStamp))
        assert stamp.config is not None and stamp.config["model"]["num_classes"] == 5
        assert stamp.config["data"]["truth"] == "semantic" and "${" not in str(stamp.config)

    def test_null_removes_a_callback_or_the_loggers(self, in_tmp: Path):
        full, less = self.build(), self.build("callbacks.images=null", "logger=none")
        kinds = [{type(item).__name__ for item in run.trainer.callbacks} for run in (full, less)]
        assert kinds[0] - kinds[1] == {"ImageLogger"}
        assert [type(item).__name__ for item in full.trainer.loggers] == ["CsvLog", "EventLog"]
        assert less.trainer.loggers == []

    def test_no_callbacks_means_no_bar(self, in_tmp: Path):
        assert self.build("callbacks=none").trainer.progress_bar_callback is None

    def test_numbers_for_a_callback_that_is_not_chosen(self, in_tmp: Path):
        cfg = load_config("model=unet_small", *TINY)
        cfg.callbacks = {"ema": {"decay": 0.9}}
        with pytest.raises(ConfigError, match=r"callbacks.ema has no _target_.*callbacks.ema=null"):
            detseg.build(cfg)

    def test_a_wrong_number_of_classes_is_an_error_with_both(self, in_tmp: Path):
        with pytest.raises(ValueError, match=r"(?s)(7.*5|5.*7)"):
            self.build("data.num_classes=7")

    def test_two_builds_hold_equal_weights(self, in_tmp: Path):
        first, second, other = self.build(), self.build(), self.build("seed=2")
        states = [list(run.task.model.state_dict().values()) for run in (first, second, other)]
        assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))

    def test_ids_and_slugs(self):
        ids: set[Any] = {run_id() for _ in range(50)}
        assert len(ids) == 50 and all(len(name) == 24 for name in ids)
        assert slug("model=fcos,seed=1") == "model=fcos,seed=1" and slug("") != ""
        assert "/" not in slug("data.root=/a/b") and slug("data.root=/a/b") != slug("data.root=/a_b")
        assert len(slug("x" * 400)) <= 120 and slug("x" * 400) != slug("x" * 401)
