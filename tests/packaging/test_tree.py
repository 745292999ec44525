"""The files around the code: packages, pins, paths and the two commands that README opens with."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from shared import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
PUBLIC_HOSTS = {
    "arxiv.org",
    "calvin.inf.ed.ac.uk",
    "cocodataset.org",
    "data.csail.mit.edu",
    "docs.python.org",
    "docs.pytorch.org",
    "doi.org",
    "download.pytorch.org",
    "github.com",
    "home.bharathh.info",
    "host.robots.ox.ac.uk",
    "hydra.cc",
    "images.cocodataset.org",
    "keepachangelog.com",
    "openaccess.thecvf.com",
    "proceedings.neurips.cc",
    "pytorch.org",
    "sceneparsing.csail.mit.edu",
    "semver.org",
    "thor.robots.ox.ac.uk",
    "www.apache.org",
    "www.cityscapes-dataset.com",
    "www.robots.ox.ac.uk",
    "www2.eecs.berkeley.edu",
}


LOOPBACK = {"127.0.0.1", "0.0.0.0"}
EXAMPLES = re.compile(r"(?:10\.\d+|192\.0|203\.0)\.\d+\.\d+")
"""Addresses that name no machine anywhere: private ones in tests' own networks, and those kept for documents."""


def tracked() -> list[Path]:
    """Return the repository's own text files."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git work tree")
    paths = [REPO / line for line in done.stdout.splitlines()]
    return [path for path in paths if path.is_file() and path.suffix not in (".png", ".jpg", ".pth", ".npz", ".gif")]


def test_packages_are_the_tree():
    source = REPO / "src"
    found = {".".join(path.parent.relative_to(source).parts) for path in source.rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"detseg.conf"}
    folders = {path.parent for path in source.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert list((REPO / "conf").rglob("*.py")) == [REPO / "conf" / "__init__.py"]


def test_constraints_are_exact_and_name_no_place():
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!_]*", line)]
    assert wrong == []
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in pins}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-") for line in wanted}
    assert names - pinned == set()


def test_every_bound_has_its_reason():
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    bounds = [line for line in text.splitlines() if re.match(r'\s+"[a-zA-Z][\w.-]*[<>=]', line)]
    assert len(bounds) >= 25
    assert [line for line in bounds if "#" not in line] == []


def test_no_file_names_a_machine_or_a_private_place():
    private = re.compile("|".join(["/" + name + "/" for name in ("root", "work", "home", "Users")]))
    address = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
    wrong = []
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            hosts = {host.partition(":")[0] for host in re.findall(r"https?://([^/\s\"'`)>\]{]+)", line)}
            hosts -= PUBLIC_HOSTS | LOOPBACK
            found = private.findall(line) + sorted(hosts)
            found += [] if path.name == "constraints.txt" else _addresses(address.findall(line))
            wrong += [f"{path.relative_to(REPO)}:{number}: {text}" for text in found]
    assert wrong == []


def _addresses(found: list[str]) -> list[str]:
    return [text for text in found if text not in LOOPBACK and not EXAMPLES.fullmatch(text)]


def test_readme_opens_with_the_two_commands_and_is_finished():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    opening = "\n".join(text.splitlines()[:20])
    assert "make train" in opening and "make test" in opening
    assert opening.index("make train") < opening.index("make test")
    unfinished = [path for path in tracked() if path.suffix == ".md" and "TODO(" in path.read_text(encoding="utf-8")]
    assert unfinished == [], "fill in what was measured"


def test_readme_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (REPO / page).read_text(encoding="utf-8")):
            assert (REPO / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_ci_runs_what_the_readme_says():
    script = REPO / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    for command in ("make setup", "make check", "make test", "make train"):
        assert command in script.read_text(encoding="utf-8")
        assert command in (REPO / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_installs_once_and_again_when_the_pins_change(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path)

    def up_to_date() -> bool:
        return subprocess.run(["make", "-q", "setup"], cwd=tmp_path, capture_output=True).returncode == 0

    assert not up_to_date()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed-detseg").touch()
    assert up_to_date()
    later = (tmp_path / "constraints.txt").stat().st_mtime + 100
    import os

    os.utime(tmp_path / "constraints.txt", (later, later))
    assert not up_to_date()
    shown = subprocess.run(["make", "help"], cwd=tmp_path, capture_output=True, text=True).stdout
    for target in ["setup", "train", "test", "check", "format", "bench", "notebooks", "wheel", "clean"]:
        assert re.search(rf"^{target}\s+\w", shown, re.MULTILINE), target
