"""Every config file that ships: composes, resolves, builds; every experiment runs two steps."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import detseg
from detseg.config import check_targets, load_config
from detseg.suggest import flat_keys
from shared import REPO, SHARED

CONF = REPO / "conf"
GROUPS = ("model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "debug", "launcher")
GROUPS += ("sweep", "experiment", "features", "augment")
FILES = sorted(f"{path.parent.name}={path.stem}" for group in GROUPS for path in CONF.glob(f"{group}/*.yaml"))
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
DATA_KEYS = {"batch_size": 2, "eval_batch_size": 2, "num_workers": 0}
PUBLISHED = ("ade20k", "camvid", "cityscapes", "coco_stuff", "pets", "voc2012")
MISSING = tuple(f"data={name}" for name in ("coco", "voc", "yolo", "masks", *PUBLISHED))  # need a root from the user


@cache
def composed(choice: str) -> DictConfig:
    """Return what a choice composes to; nobody changes it."""
    return load_config(choice, *(["data.root=somewhere"] if choice in MISSING else []))


@pytest.mark.parametrize("choice", FILES)
def test_every_choice_composes_resolves_and_names_allowed_targets(choice: str):
    cfg = composed(choice)
    check_targets(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    assert cfg.model._target_.startswith("detseg.models.") and cfg.task.monitor.startswith("val/")
    assert not OmegaConf.missing_keys(cfg) or choice in MISSING


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_numbers_are_plain_and_every_list_of_defaults_is_a_list(path: Path):
    """YAML reads 1e-3 without a dot as text; a config that says so trains with a string."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    assert isinstance(content, dict) and isinstance(content.get("defaults", []), list)
    assert not re.findall(r":\s*\d+e-?\d+\b", text), "write 1.0e-3, with a dot"


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONF.rglob("*.yaml")) if path.parent.name not in ("experiment", "hydra")],
    ids=lambda path: str(path.relative_to(CONF)),
)
def test_every_value_has_a_comment_on_its_line_or_above(path: Path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    values = re.compile(r"\s*(?!_target_|_partial_)[\w.]+: +\S")
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if values.match(line) and "#" not in line and not above.lstrip().startswith("#")
    ]
    assert bare == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_sets_numbers_and_choices_alone(name: str):
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "_target_" not in text and text.startswith("# @package _global_\n")
    head = text.split("defaults:")[0]
    assert f"command: detseg train experiment={name}" in head and "result:" in head and "cost:" in head
    content = yaml.safe_load(text)
    assert all(key.startswith("override /") for entry in content["defaults"] for key in entry)
    assert content["name"] == name
    known = set(flat_keys(composed(f"experiment={name}")))
    assert set(flat_keys(OmegaConf.create({k: v for k, v in content.items() if k != "defaults"}))) <= known


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_two_steps(name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETSEG_SHARED", str(SHARED))
    cfg = load_config(
        f"experiment={name}", "trainer=cpu", "debug=default", "callbacks=none", "trainer.detect_anomaly=false"
    )
    if cfg.data._target_ != "detseg.data.Orchard" and not SHARED.is_dir():
        pytest.skip(f"{name} needs the shared data")
    for key, value in DATA_KEYS.items():
        cfg.data[key] = value
    if cfg.data._target_ == "detseg.data.Orchard":
        cfg.data.train_images = cfg.data.val_images = 4
    cfg.logger = cfg.callbacks = None
    cfg.trainer.check_val_every_n_epoch = 1
    run = detseg.build(cfg)
    run.trainer.fit(run.task, run.data)
    assert run.trainer.global_step == 2
    assert run.task.results["val"]["loss"] > 0 and float(run.trainer.callback_metrics["train/loss"]) > 0
