"""Images whose sides are no multiple of a stride: cells stay where the backbone's strides put them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.models.prior_detector import PriorDetector
from detseg.structures import Target
from detseg.targets.priors import prior_strides

HEIGHT, WIDTH = 121, 127
OBJECTS = torch.tensor([[110.0, 50, 126, 66], [4, 100, 30, 119], [90, 96, 124, 118]])


@pytest.mark.parametrize("name", ["yolo_small", "yolo_v2_small", "yolo_v3_small"])
def test_cells_cover_the_image_and_codes_give_the_objects_back(name: str) -> None:
    cfg = load_config(f"model={name}", "data.num_classes=2")
    model = instantiate(cfg.model, path="model").eval()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, HEIGHT, WIDTH))
    lattice, first = outputs.lattice, 0
    for count, stride in zip(lattice.counts, model.backbone.strides, strict=True):
        middle = (lattice.boxes[first : first + count, :2] + lattice.boxes[first : first + count, 2:]) / 2
        first += count
        assert_close(middle.amin(0), torch.full((2,), stride / 2))
        assert bool(((torch.tensor([WIDTH, HEIGHT]) - middle.amax(0)).abs() <= stride / 2).all())
    if isinstance(model, PriorDetector):
        found = model.assign(outputs, [Target(boxes=OBJECTS, labels=torch.tensor([0, 1, 1]))])
        stride = prior_strides(lattice)[found.rows]
        codes = model.coder.encode(found.boxes, found.references, stride)
        assert_close(model.coder.decode(codes, found.references, stride), found.boxes, rtol=0, atol=1e-2)
        assert len(found.rows) == len(OBJECTS)
