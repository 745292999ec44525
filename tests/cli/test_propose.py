"""``detseg propose``: what it keeps, measures, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import detseg
from detseg.cli.main import main
from detseg.config import load_config
from detseg.engine.propose import propose, ranked

SMALL = ["data.train_images=4", "data.val_images=3", "data.test_images=2", "data.image_size=64", "workers=0"]


@pytest.fixture(autouse=True)
def own_cache(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETSEG_CACHE", str(in_tmp / "cache"))
    return in_tmp / "cache"


def test_fills_measures_draws_and_prints(own_cache: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["propose", *SMALL, "splits=[val,train]", "limits=[5,500]"]) == 0
    told = capsys.readouterr().out
    assert "SelectiveSearch(mode='fast', limit=2000" in told and "recall" in told and "made now" in told
    assert len(list(own_cache.rglob("*.boxes"))) == 7
    (directory,) = Path("runs/propose-orchard").iterdir()
    assert sorted(path.name for path in directory.glob("*.png")) == ["proposals_train.png", "proposals_val.png"]
    figures = json.loads((directory / "metrics.json").read_text())
    assert set(figures) == {"val", "train"} and figures["val"]["made"] == 3
    assert 0.8 < figures["train"]["recall_50_500"] <= 1 and figures["train"]["ar_5"] < figures["train"]["ar_500"]
    assert f"{figures['val']['recall_50_500']:.4f}" in told
    assert main(["propose", *SMALL, "splits=[val]"]) == 0  # again: nothing is left to be made
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " val " in line]
    assert rows[0][3:9:2] == ["3", "0", f"{figures['val']['boxes']:.1f}"] and "-" in rows[0]


def test_a_run_finds_what_was_made(own_cache: Path):
    """A model of the same settings reads the files; its samples have these very boxes."""
    cfg = load_config(*SMALL, "proposals=sliding_window", "proposals.scales=[20]", "splits=[val]", name="propose")
    found = propose(cfg)
    assert [one.split for one in found.splits] == ["val"] and found.splits[0].filling.made == 3
    made = set(own_cache.rglob("*.boxes"))
    settings = ["proposals@model.proposer=sliding_window", "model.proposer.scales=[20]", "model.proposer.limit=2000"]
    run = detseg.build(load_config("model=fast_rcnn_small", *SMALL[:-1], "data.num_workers=0", *settings))
    assert run.data.proposer is run.task.model.proposer and run.data.proposer.key == found.maker
    run.data.setup("validate")
    batch = next(iter(run.data.val_dataloader()))
    assert {len(boxes) for boxes in batch.proposals} == {int(found.splits[0].boxes)}
    assert set(own_cache.rglob("*.boxes")) == made


def test_recall_of_every_window_is_that_of_the_metric():
    """An object of 64 x 64 pixels or less in windows of 64: those that fill half of the image are found at IoU 0.5."""
    cfg = load_config(
        *SMALL, "proposals=sliding_window", "proposals.scales=[64]", "proposals.ratios=[1]", name="propose"
    )
    found = propose(cfg)
    for one in found.splits:
        data = detseg.data.Orchard(train_images=4, val_images=3, test_images=2, image_size=64)
        targets = [data.dataset(one.split)[row].target for row in range(one.filling.images)]
        areas = torch.cat([target.boxes for target in targets])
        large = ((areas[:, 2] - areas[:, 0]) * (areas[:, 3] - areas[:, 1]) >= 64 * 32).sum()
        assert one.boxes == 1 and one.figures["ar_count"] == len(areas)
        assert one.figures["recall_50_100"] == pytest.approx(int(large) / max(1, len(areas)), nan_ok=True)


def test_boxes_are_ranked_as_they_come():
    found = ranked(torch.zeros((3, 4)))
    assert found.scores.tolist() == pytest.approx([1, 2 / 3, 1 / 3]) and len(ranked(torch.zeros((0, 4)))) == 0


@pytest.mark.parametrize(
    "wrong, code, said",
    [
        (["splits=[vla]"], 1, "no split 'vla'; it has train, val, test"),
        (["proposals=selective_serach"], 2, "selective_search"),
        (["proposals.mode=slow"], 1, "mode 'slow' is unknown; choose one of single, fast, quality"),
        (["limits=[300,100]"], 1, "ascending"),
        (["--multirun"], 2, "takes key=value"),
    ],
)
def test_what_does_not_exist_is_one_line_before_the_work(
    wrong: list[str], code: int, said: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["propose", *SMALL, *wrong]) == code
    assert not list(own_cache.rglob("*.boxes"))
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_help_shows_its_keys(capsys: pytest.CaptureFixture[str]):
    assert main(["propose", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: detseg propose" in text and "splits: null" in text
