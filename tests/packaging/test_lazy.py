"""What starting costs; benchmarks/startup.py measures the seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import detseg

HEAVY = ("torch", "torchvision", "lightning", "hydra", "omegaconf", "numpy", "cv2", "wandb", "matplotlib")


def loaded_by(code: str) -> tuple[list[str], str]:
    """Run code in a fresh interpreter; return which heavy libraries it loaded, and its output."""
    report = f"\nimport sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    *output, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(output)


def test_import_loads_nothing_heavy():
    assert loaded_by("import detseg; dir(detseg)")[0] == []


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['detseg', '--help']\nfrom detseg.cli.main import main\n"
    loaded, output = loaded_by(code + "try:\n    main()\nexcept SystemExit:\n    pass")
    assert loaded == []
    for verb in ("train", "evaluate", "predict"):
        assert verb in output


LAUNCHER = """
import os
from pathlib import Path
import detseg.cli.verbs, detseg.engine.processes.launch
from detseg.cli.show import show
from detseg.config import load_config
from detseg.engine.processes.plan import launches
from detseg.experiment import Outcome, check_start, is_first_process
cfg = load_config("trainer=ddp_cpu")
check_start(cfg)
assert launches(cfg)
figures = {"map": 0.5, "ar": float("nan"), "ar_count": 0.0, "map/apple": 0.25}
show(Outcome(directory=Path("run"), figures=figures, monitor="map", class_names=["apple"]))
for rank in ("0", "1"):
    os.environ["RANK"] = rank
    assert is_first_process() == (rank == "0")
"""


def test_what_starts_processes_and_prints_their_figures_loads_neither_torch_nor_lightning():
    loaded, output = loaded_by(LAUNCHER)
    assert loaded == ["hydra", "omegaconf"]
    assert all(text in output for text in ("0.5000", "n/a (0 objects)", "0.2500", "run"))


def test_structures_do_not_load_lightning():
    assert loaded_by("from detseg import Detections, Target")[0] == ["torch", "numpy"]


def test_every_public_name_resolves():
    for name in detseg.__all__:
        assert getattr(detseg, name) is not None
    assert set(detseg.__all__) <= set(dir(detseg))


def test_an_unknown_name_says_what_there_is():
    try:
        detseg.Detection  # noqa: B018
    except AttributeError as error:
        assert "Detections" in str(error)
    else:
        raise AssertionError("detseg.Detection exists")
