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
