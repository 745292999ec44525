from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from detseg.data import cache
from detseg.data.builder import RawObject, StoreBuilder
from detseg.data.check import Report
from detseg.data.store import AnnotationStore


def kept() -> tuple[AnnotationStore, Report]:
    builder = StoreBuilder(source="x", categories={5: "a"})
    builder.add_image("ü.png", 7, (20, 30))
    builder.add(RawObject(0, [-2, 3, 12, 13], 5, "annotation 1"))
    return builder.build(), builder.report


def test_what_was_saved_is_loaded(own_cache: Path) -> None:
    store, report = kept()
    assert cache.load("key") is None
    path = cache.save("key", store, report)
    assert path == own_cache / "key.npz"
    found = cache.load("key")
    assert found is not None and found[1] == report and found[1].count("clipped") == 1
    for name, array in store.arrays().items():
        np.testing.assert_array_equal(found[0].arrays()[name], array)
    assert [entry.name for entry in own_cache.iterdir()] == ["key.npz"]  # no part files


def test_a_broken_file_counts_as_absent(own_cache: Path) -> None:
    path = cache.save("key", *kept())
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    assert cache.load("key") is None
    assert cache.save("key", *kept()) == path and cache.load("key") is not None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETSEG_CACHE", str(tmp_path / "file" / "below"))
    assert cache.save("key", *kept()) is None and cache.load("key") is None


def test_the_next_folder_is_taken_where_the_first_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("DETSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    path = cache.save("key", *kept())
    assert path is not None and path.is_relative_to(tmp_path / "temporary") and cache.load("key") is not None


def test_fingerprint_changes_with_content_names_and_options(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "images"
    file.write_text("{}")
    folder.mkdir()
    (folder / "1.png").write_bytes(b"12")

    def key(options: str = "Coco") -> str:
        return cache.fingerprint(options=options, contents=[file, tmp_path / "missing"], folders=[folder])

    first = key()
    assert key() == first
    assert key("Voc") != first
    file.write_text("[]")
    changed = key()
    assert changed != first
    file.write_text("{}")
    os.utime(file, (0, 0))
    assert key() == first  # content counts, not time
    (folder / "2.png").write_bytes(b"12")
    assert key() != first
