"""Equal runs are told apart from different ones by what they resolve to, not by what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detseg.config import ConfigError, load_config
from detseg.engine.sweeps.fingerprint import NOTES, fingerprint, register


def test_place_and_name_do_not_matter_and_numbers_do():
    base = fingerprint(load_config("trainer=cpu"))
    assert len(base) == 16 and fingerprint(load_config("trainer=cpu")) == base, "another run id is another place"
    assert fingerprint(load_config("trainer=cpu", "name=other", "paths.root=elsewhere")) == base
    assert fingerprint(load_config("trainer=cpu", "optimizer.lr=2e-3")) == base, "the default, typed another way"
    assert fingerprint(load_config("trainer=cpu", "optimizer.lr=3e-3")) != base
    assert fingerprint(load_config("trainer=cpu", "seed=2")) != base
    assert fingerprint(load_config("trainer=cpu", "callbacks.checkpoint.save_top_k=2")) != base


def test_what_a_search_adds_does_not_matter_and_the_config_stays_as_it_is():
    cfg = load_config("trainer=cpu")
    before = OmegaConf.to_container(cfg, resolve=False)
    base = fingerprint(cfg)
    assert OmegaConf.to_container(cfg, resolve=False) == before
    tuned = load_config("trainer=cpu", "tune.trials=3", name="tune")
    OmegaConf.update(tuned, "callbacks.pruning", {"_target_": "x", "trial": 7}, force_add=True)
    tuned.resume = "runs/a/b"
    assert fingerprint(tuned) == base


def test_a_twin_is_refused_and_both_are_named(tmp_path: Path):
    register(tmp_path, "a=1", "f" * 16)
    register(tmp_path, "a=2", "e" * 16)
    register(tmp_path, "a=1", "f" * 16)  # gone on with
    with pytest.raises(ConfigError, match="the trials a=1 and a=1,b=3 have the same resolved config"):
        register(tmp_path, "a=1,b=3", "f" * 16)
    assert (tmp_path / NOTES).read_text().splitlines() == [f"{'f' * 16} a=1", f"{'e' * 16} a=2"]
