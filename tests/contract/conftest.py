from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let all tests of one model follow each other: it is built in one worker alone, and gone before the next."""
    here = Path(__file__).parent
    places = [place for place, item in enumerate(items) if here in item.path.parents]
    ordered = sorted((items[place] for place in places), key=_model)  # stable: of a model they stay in their order
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _model(item: pytest.Item) -> tuple[str, str]:
    """Return the file of a test and the name of the model that it is about."""
    call = getattr(item, "callspec", None)
    return str(item.path), "" if call is None else str(call.params.get("name", ""))
