"""Real data for tests, which is no part of the package: a test that needs it is skipped where it is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DETSEG_SHARED", REPO.parent / "shared")).resolve()

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"real data is not at {SHARED}; set DETSEG_SHARED to its directory"
)
