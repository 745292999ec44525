"""The direction of imports: a room knows nothing of the rooms to its right (DESIGN: structures -> ... -> cli)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import REPO

SOURCE = REPO / "src" / "detseg"
ROOMS = [
    "structures",
    "ops",
    "nn",
    "targets",
    "losses",
    "models",
    "metrics",
    "data",
    "tasks",
    "callbacks",
    "engine",
    "cli",
]
# Modules beside the rooms, and which rooms and modules each may know; "*" is everything.
BESIDE = {
    "allow": (),
    "lazy": (),
    "stamp": ("secrecy",),
    "suggest": (),
    "atomic": (),
    "durable": ("atomic",),
    "secrecy": (),
    "storage": (),
    "lettering": (),
    "visualize": ("structures", "ops", "lettering", "data"),
    "predictor": ("structures", "data", "models"),
    "checkpoint": ("allow", "durable", "nn", "predictor", "stamp"),
    "results": ("structures",),
    "config": ("*",),
    "evaluation": ("*",),
    "experiment": ("*",),
    "prediction": ("*",),
}
KNOWN_BESIDE = {
    "nn": {"durable"},
    "models": {"lazy"},
    "metrics": {"lazy"},
    "data": {"atomic", "lazy"},
    "callbacks": {"stamp", "visualize", "lettering", "results", "atomic", "durable", "secrecy", "storage"},
    "engine": set(BESIDE),
    "cli": set(BESIDE),
}
LIGHTNING = {"data", "tasks", "callbacks", "engine", "cli", "config", "evaluation", "experiment"}
HYDRA = {"engine", "cli", "config", "evaluation", "experiment", "prediction", "suggest"}
MODULES = sorted(path for path in SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, wherever in the file; relative ones are made absolute."""
    package = ("detseg", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def place(path: Path) -> str:
    """Return the room of a file, or the name of a module beside the rooms."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def allowed(here: str, there: str) -> bool:
    if here == there or here == "__init__":
        return True
    if here in ROOMS:
        if there in ROOMS:
            return ROOMS.index(there) <= ROOMS.index(here) and not (there == "models" and here in ("metrics", "data"))
        return there in KNOWN_BESIDE.get(here, ())
    return "*" in BESIDE[here] or there in BESIDE[here]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_left(path):
    here = place(path)
    known = {"__init__", *ROOMS, *BESIDE}
    assert here in known, f"{path} is a room or module that this test does not know: add it to the order"
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "detseg" and len(parts) > 1 and parts[1] in known and not allowed(here, parts[1]):
            wrong.append(f"line {line}: {here} must not import {name}")
        if parts[0] in ("lightning", "pytorch_lightning") and here not in LIGHTNING:
            wrong.append(f"line {line}: Lightning belongs to {sorted(LIGHTNING)}")
        if parts[0] in ("hydra", "omegaconf") and here not in HYDRA:
            wrong.append(f"line {line}: Hydra belongs to {sorted(HYDRA)}")
    assert not wrong, f"{path.relative_to(REPO)}: " + "; ".join(wrong)


def test_the_rule_itself():
    assert allowed("models", "losses") and not allowed("losses", "models")
    assert not allowed("data", "models") and not allowed("metrics", "models") and allowed("tasks", "models")
    assert not allowed("models", "config") and allowed("cli", "config")
    assert allowed("callbacks", "stamp") and not allowed("nn", "stamp")


def test_every_room_exists_and_has_modules():
    found = {place(path) for path in MODULES}
    assert set(ROOMS) <= found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_a_reader_bears(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path.relative_to(REPO)} has {lines} lines; split what does not belong together"
