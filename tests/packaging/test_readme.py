"""Every command and every line of Python in README does what it says."""

from __future__ import annotations

import re
import shlex

import pytest

import detseg
from detseg.cli.main import VERBS
from detseg.engine.sweeps.space import read_space
from shared import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("detseg train")]
EXPERIMENTS = {path.stem for path in (REPO / "conf" / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands_compose(command):
    words = [word for word in shlex.split(command.replace("$RUN", "runs/a/b"))[2:] if word != "-m"]
    single = [re.sub(r"^([\w.]+=)(?![\[{])([^,]*),.*$", r"\1\2", word) for word in words]  # of a sweep the first
    cfg = detseg.load_config(*single)
    for word in single:
        key, value = word.split("=", 1)
        if key in ("data.root", "name", "resume", "init_from"):
            assert detseg.config.OmegaConf.select(cfg, key) == value
    assert cfg.model._target_.startswith("detseg.")


def test_there_are_commands_for_everything():
    assert len(COMMANDS) >= 12
    text = " ".join(COMMANDS)
    for choice in ("coco", "voc", "yolo", "masks"):
        assert f"data={choice} " in text
    verbs = {line.split()[1] for line in LINES if line.startswith("detseg ")}
    assert verbs == set(VERBS)


def test_searches_have_a_space_and_compose():
    searches = [line for line in LINES if line.startswith("detseg tune") and "..." not in line]
    assert len(searches) >= 2
    for line in searches:
        space = read_space([word for word in shlex.split(line)[2:] if "=" in word])
        assert space.dimensions
        assert detseg.load_config(*space.fixed, name="tune").tune.trials == 20


def test_features_have_a_row_each():
    named = set(re.findall(r"`(\w+)`", README.partition("## Training features")[2].partition("\n## ")[0]))
    assert {path.stem for path in (REPO / "conf" / "features").glob("*.yaml")} <= named


def test_every_model_and_experiment_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)`(?: \+ `_small`)? \|", README, flags=re.MULTILINE))
    models = {card.name for card in detseg.models.available() if not card.name.endswith("_small")}
    assert models <= rows
    measured = {name for name in EXPERIMENTS if name.startswith(("orchard_", "bccd_", "dsb2018_"))}
    assert measured <= rows
    paired = [name for name in models if f"| `{name}` + `_small` |" in README]
    assert len(paired) >= 5
    for name in paired:
        assert (REPO / "conf" / "model" / f"{name}_small.yaml").is_file()


def test_the_python_names_exist():
    code = next(block for block in BLOCKS if block.startswith("import detseg"))
    for name in re.findall(r"detseg\.(\w+)", code):
        assert name in detseg.__all__
    compile(code, "README.md", "exec")
