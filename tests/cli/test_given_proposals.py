"""A model without a region proposal network, from training to photos: the same proposals everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import detseg
from detseg.cli.main import main
from detseg.ops.selective_search import SelectiveSearch
from drawn_data import scenes, write_coco

SETTINGS = [
    "trainer=cpu",
    "model=fast_rcnn_small",
    "data=coco",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.train_transform.size=[64,96]",
    "data.eval_transform.size=[64,96]",
    "trainer.max_epochs=1",
]


@pytest.mark.slow
def test_predictions_are_those_of_the_evaluation(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    """Photos of 48 x 64 are shown to the model at 64 x 96; proposals are made of the photos, once each."""
    monkeypatch.setenv("DETSEG_CACHE", str(in_tmp / "cache"))
    for split in ("train", "val"):
        write_coco(in_tmp / "data", scenes(4, seed=len(split)), split)
    assert main(["train", *SETTINGS, f"data.root={in_tmp / 'data'}"]) == 0
    kept = list((in_tmp / "data" / ".detseg" / "proposals").rglob("*.boxes"))
    assert len(kept) == 8 and not list((in_tmp / "cache").rglob("*.boxes"))
    (run,) = Path("runs").glob("coco-fast_rcnn_small/*")
    figures = json.loads((run / "metrics.json").read_text())
    assert 0 < figures["proposal_recall_50_300"] <= 1 and list((run / "pictures").glob("*_proposals.png"))

    calls = []
    search = SelectiveSearch.__call__
    monkeypatch.setattr(SelectiveSearch, "__call__", lambda own, image: calls.append(1) or search(own, image))
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert main(["evaluate", f"ckpt={checkpoint}"]) == 0
    assert calls == []  # evaluation reads what training kept
    (evaluated,) = Path("runs/evaluate").iterdir()
    rows = json.loads((evaluated / "predictions.json").read_text())
    assert json.loads((evaluated / "metrics.json").read_text())["map"] == figures["map"]

    model = detseg.load(checkpoint)
    photos = sorted((in_tmp / "data" / "val").glob("*.png"))
    for number, found in enumerate(model(photos)):
        own = [row for row in rows if row["image_id"] == 10 * number]
        assert len(found) == len(own)
        expected = torch.tensor([row["bbox"] for row in own]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        assert_close(found.boxes, expected, rtol=0, atol=1e-3)
        assert_close(found.scores, torch.tensor([row["score"] for row in own]), rtol=0, atol=1e-5)
    assert len(calls) == 4 and rows
