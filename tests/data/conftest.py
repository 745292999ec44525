from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checked annotations of a test are kept in its own folder, so that no test sees another's."""
    monkeypatch.setenv("DETSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
