"""``detseg anchors``: what it finds, writes, prints and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from detseg.cli.main import main
from detseg.config import instantiate, load_config
from detseg.data import Orchard
from detseg.engine.anchors import anchors, box_sizes
from detseg.ops.size_clusters import cluster_sizes, mean_best_iou

SMALL = ["data.train_images=12", "data.image_size=64", "data.num_workers=0"]


def test_finds_writes_and_prints_what_a_model_takes(in_tmp: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["anchors", *SMALL, "count=6", "levels=3"]) == 0
    told = capsys.readouterr().out
    (directory,) = Path("runs/anchors-orchard").iterdir()
    written = yaml.safe_load((directory / "anchors.yaml").read_text())
    sizes = written["model"]["anchors"]["sizes"]
    assert [len(level) for level in sizes] == [2, 2, 2]
    areas = [width * height for level in sizes for width, height in level]
    assert areas == sorted(areas)
    figures = json.loads((directory / "metrics.json").read_text())
    assert f"mean IoU with the best of these anchors {figures['mean_iou']:.4f}" in told
    assert 0.7 < figures["mean_iou"] < 1 and figures["mean_iou_1"] < figures["mean_iou_6"]
    override = re.search(r"'(model\.anchors\.sizes=\S+)'", told)
    assert override is not None
    cfg = load_config("model=yolo_v3_small", override.group(1))
    assert instantiate(cfg.model.anchors, path="model.anchors").num_anchors() == [2, 2, 2]
    assert [[[float(v) for v in pair] for pair in level] for level in cfg.model.anchors.sizes] == sizes


def test_the_sizes_are_those_of_the_training_boxes_at_the_training_size(in_tmp: Path):
    cfg = load_config(*SMALL, "count=3", "digits=2", "data.eval_transform.size=[128,128]", name="anchors")
    found = anchors(cfg)
    data = Orchard(train_images=12, image_size=64, num_workers=0)
    boxes = torch.cat([data.dataset("train")[row].target.boxes for row in range(12)]) * 2
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert found.boxes == len(sizes) and torch.equal(box_sizes(data, "train") * 2, sizes)
    wanted = cluster_sizes(sizes, 3, seed=1)
    assert found.by_count[3] == pytest.approx(mean_best_iou(sizes, wanted))
    assert_close(torch.tensor(found.sizes).view(3, 2), wanted.float(), rtol=0, atol=0.0051)
    assert anchors(cfg).sizes == found.sizes  # again


@pytest.mark.parametrize(
    "wrong, code, said",
    [
        (["count=5", "levels=3"], 2, "count=5 anchors cannot be shared out among levels=3"),
        (["count=3000"], 2, "3000 clusters of"),
        (["split=vla"], 1, "no split 'vla'; it has train, val, test"),
        (["--multirun"], 2, "takes key=value"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    wrong: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], in_tmp: Path
):
    assert main(["anchors", *SMALL, *wrong]) == code
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_help_shows_its_keys(capsys: pytest.CaptureFixture[str]):
    assert main(["anchors", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: detseg anchors" in text and "levels: 1" in text
