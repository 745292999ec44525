"""What can be written after ``model=``: the YAML files of ``conf/model``, with the papers in their headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class ModelCard:
    """One file of ``conf/model``.

    Attributes:
        name: what is written after ``model=``.
        paper: authors and title, from the file's ``# paper:`` line or that of the file which it inherits from.
        year: of the paper's publication; 0 where the file names none.
    """

    name: str
    paper: str
    year: int

    def __str__(self) -> str:
        return f"{self.name:<24} {self.year or '':>4}  {self.paper}"


def available() -> list[ModelCard]:
    """List every model that ``model=<name>`` takes, oldest paper first."""
    folder = files("detseg.conf").joinpath("model")
    texts = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    cards = [ModelCard(name, _header(texts, name, "paper"), int(_header(texts, name, "year") or 0)) for name in texts]
    return sorted(cards, key=lambda card: (card.year, card.name))


def _header(texts: dict[str, str], name: str, key: str) -> str:
    """Read ``# key: value`` from a file's comments, else from the first file of the group that it inherits from."""
    found = re.search(rf"^#\s*{key}:\s*(.+?)\s*$", texts[name], flags=re.MULTILINE)
    if found:
        return found.group(1)
    defaults = (yaml.safe_load(texts[name]) or {}).get("defaults", [])
    parent = next((entry for entry in defaults if isinstance(entry, str) and entry in texts and entry != name), None)
    return _header(texts, parent, key) if parent else ""
