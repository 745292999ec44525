"""The nearest names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from omegaconf import DictConfig, OmegaConf

from detseg.suggest import explain, flat_keys, nearest

CONFIG = OmegaConf.create({"seed": 1, "trainer": {"max_epochs": 3, "max_steps": "${seed}"}, "task": {"mode": "max"}})
GROUPS = {"model": ["fcos", "unet"], "trainer": ["cpu"], "transform/train": ["detection"]}


def compose(choices: Sequence[str]) -> DictConfig:
    return CONFIG


def said(*overrides: str) -> str | None:
    return explain(overrides, compose=compose, groups=GROUPS)


def test_flat_keys_hold_groups_and_leaves_and_resolve_nothing():
    assert flat_keys(CONFIG) == ["seed", "trainer", "trainer.max_epochs", "trainer.max_steps", "task", "task.mode"]


@pytest.mark.parametrize(
    "word, expected",
    [
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("max_epochs", "trainer.max_epochs"),
        ("sed", "seed"),
        ("trainr.max_steps", "trainer.max_steps"),
        ("modle", "model"),  # not task.mode, which is deeper
    ],
)
def test_the_nearest_comes_first(word: str, expected: str):
    assert nearest(word, [*flat_keys(CONFIG), "model"])[0] == expected


def test_nothing_near_is_nothing():
    assert nearest("zzz", flat_keys(CONFIG)) == []


def test_choices_come_before_keys_and_are_listed():
    assert said("model=fcoss", "sed=1") == "there is no model=fcoss. Did you mean fcos? Choices: fcos, unet."
    assert said("transform/train@data.train_transform=x") == ("there is no transform/train=x. Choices: detection.")
    assert said("model=fcos,unett") == "there is no model=unett. Did you mean unet? Choices: fcos, unet."


def test_a_word_alone_is_no_override():
    assert said("unet") == "'unet' has no value: write key=value. Did you mean model=unet?"
    assert said("model", "sed=1") == "'model' has no value: write key=value. Choices: fcos, unet."
    assert said("faster", "model=fcos") == "'faster' has no value: write key=value."


def test_sound_overrides_are_not_at_fault():
    assert said("model=fcos", "trainer.max_epochs=1", "+new.key=3", "~task", "hydra.mode=RUN", "model=null") is None
