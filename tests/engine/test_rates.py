from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf

from detseg.config import build_task, instantiate, load_config
from detseg.engine.rates import scaled, scaling


def prepared(*overrides: str):
    cfg = load_config("model=fcos_small", "trainer=ddp_cpu", "data.batch_size=4", *overrides)
    cfg.data.num_classes = 3
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (["optimizer=sgd"], 2.0),
        (["optimizer=adamw"], math.sqrt(2)),
        (["optimizer=sgd", "lr_rule=sqrt"], math.sqrt(2)),
        (["optimizer=adamw", "lr_rule=linear", "trainer.devices=3"], 3.0),
        (["optimizer=adamw", "lr_rule=none"], 1.0),
        (["optimizer=sgd", "lr_batch=16"], 0.5),
        (["optimizer=sgd", "lr_batch=16", "trainer.accumulate_grad_batches=4"], 2.0),
        (["optimizer=sgd", "trainer.accumulate_grad_batches=4"], 2.0),
        (["optimizer=sgd", "trainer=cpu"], 1.0),
    ],
)
def test_the_rate_follows_the_images_per_step(overrides: list[str], factor: float):
    cfg = prepared(*overrides)
    rate = cfg.optimizer.lr
    task = build_task(cfg, class_names=["a", "b", "c"])
    assert task.optimizer.keywords["lr"] == pytest.approx(rate * factor)
    groups = task.parameter_groups()
    assert [group["lr"] for group in groups] == pytest.approx([rate * factor] * len(groups))
    assert task.optimizer(groups).param_groups[0]["lr"] == pytest.approx(rate * factor)


def test_the_rule_is_said_in_one_line():
    cfg = prepared("optimizer=adamw", "optimizer.lr=0.002")
    said = str(scaling(cfg, instantiate(cfg.optimizer)))
    assert said.startswith("learning rate 0.002828: 0.002 is for 4 images a step, there are 8")
    assert "AdamW's follows them by the square root (lr_rule=sqrt)" in said
    assert "\n" not in said
    one = prepared("optimizer=sgd", "optimizer.lr=0.01", "trainer=cpu")
    said = str(scaling(one, instantiate(one.optimizer)))
    assert (
        said == "learning rate 0.01 for 4 images a step; with more, SGD's follows them in proportion (lr_rule=linear)"
    )


def test_unknown_optimisers_keep_their_rate():
    cfg = prepared()
    how = scaling(cfg, torch.optim.LBFGS)
    assert (how.rule, how.factor, how.rate) == ("none", 1.0, 1e-3)
    assert scaled(torch.optim.LBFGS, how) is torch.optim.LBFGS


def test_what_is_no_rule_is_refused():
    with pytest.raises(ValueError, match="lr_rule=cubic is unknown; choose one of auto, linear, sqrt, none"):
        scaling(prepared("lr_rule=cubic"), torch.optim.SGD)
    with pytest.raises(ValueError, match="lr_batch=0"):
        scaling(prepared("lr_batch=0"), torch.optim.SGD)
