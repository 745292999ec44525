"""The wheel works where the repository is not: built, installed elsewhere, run from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from shared import REPO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no build/ appears in the work tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, copy)
    for name in ("src", "conf"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    return next((copy / "dist").glob("detseg-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into an environment that sees this one's libraries, but not its editable detseg."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    interpreter = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--disable-pip-version-check"], check=True, capture_output=True)
    site = next(home.glob("lib/python*/site-packages"))
    # A .pth adds the directory but does not read the .pth files inside, which hold the editable install.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return interpreter


def run(command: list[str], directory: Path) -> str:
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DETSEG"))}
    done = subprocess.run(command, cwd=directory, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_holds_every_config_and_nothing_else_of_the_repository(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"detseg/conf/{path.relative_to(REPO / 'conf')}" for path in (REPO / "conf").rglob("*.yaml")}
    code = {f"detseg/{path.relative_to(REPO / 'src/detseg')}" for path in (REPO / "src/detseg").rglob("*.py")}
    assert len(conf) > 30
    assert conf | code | {"detseg/py.typed", "detseg/conf/__init__.py"} == {
        name for name in names if ".dist-info/" not in name
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_is_imported_from_where_it_was_installed(python, tmp_path):
    place = run([str(python), "-c", "import detseg; print(detseg.__file__, detseg.__version__)"], tmp_path)
    assert place.startswith(str(python.parent.parent)) and place.split()[1] == "0.1.0"


def test_help_lists_the_choices_from_another_directory(python, tmp_path):
    output = run([str(python.parent / "detseg"), "train", "--help"], tmp_path)
    for word in ("model", "fcos_small", "data", "orchard", "trainer"):
        assert word in output
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind


def test_composes_from_another_directory(python, tmp_path):
    code = "import detseg; print(detseg.load_config('model=fcos_small', 'trainer.max_epochs=3').trainer.max_epochs)"
    assert run([str(python), "-c", code], tmp_path).split()[-1] == "3"
