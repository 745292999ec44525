"""Losses of boxes and of codes in every small detector, beside what ``test_dense_choices`` tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from detseg.config import instantiate, load_config
from detseg.losses import CIoULoss, GIoULoss, SmoothL1
from detseg.models.dense import DenseDetector
from detseg.structures import Target

CONF = Path(__file__).resolve().parents[2] / "conf"
LOSSES = sorted(path.stem for path in (CONF / "box_loss").glob("*.yaml"))
OF_BOXES = ("ciou", "diou", "giou", "iou")
GRIDS = ("yolo_v2_small", "yolo_v3_small")
SHARED = ("fcos_small", "retinanet_small", "yolo_small")
CHOICES = [(name, loss) for name in ("ssd300_small", "ssdlite_small", *GRIDS) for loss in LOSSES]
CHOICES += [(name, loss) for name in SHARED for loss in ("giou", "grid_squared", "grid_cross_entropy")]
STRANGE = [("fcos_small", "max_iou"), ("fcos_small", "atss"), ("yolo_small", "max_iou"), ("yolo_small", "points")]
"""Dense detectors with an assigner that was made for references of another kind."""
TARGETS = [
    Target(boxes=torch.tensor([[4.0, 6, 34, 28], [40, 30, 60, 58]]), labels=torch.tensor([0, 1])),
    Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
]


def build(*overrides: str) -> Any:
    torch.manual_seed(0)
    cfg = load_config(*overrides, "data.num_classes=2")
    return instantiate(OmegaConf.to_container(cfg.model, resolve=True), path="model").eval()


def fits(name: str, loss: str) -> bool:
    return loss in OF_BOXES or loss.startswith("grid_") == (name in GRIDS)


@pytest.mark.parametrize(("name", "loss"), CHOICES)
def test_a_dense_detector_takes_every_box_loss_that_fits_and_refuses_the_others(name: str, loss: str) -> None:
    overrides = [f"model={name}", f"box_loss@model.box_loss={loss}"]
    if not fits(name, loss):
        with pytest.raises(Exception, match="offsets") as caught:
            build(*overrides)
        assert "GIoULoss" in str(caught.value)
        return
    model = build(*overrides)
    outputs = model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    terms = model.loss(outputs, TARGETS)
    terms["loss_box"].backward()
    assert all(bool(term.isfinite()) for term in terms.values())
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)
    if loss not in OF_BOXES:
        return
    found = model.assign(outputs, TARGETS)
    assert isinstance(model, DenseDetector) and len(found.rows) > 0
    reference = found.rows % found.matched.shape[1]
    boxes = model.decode(outputs.regression.flatten(0, 1)[found.rows].float(), reference, outputs.lattice)
    factor = getattr(model, "box_weight", 1.0) * model.loss_weights.get("box", 1.0)
    assert_close(terms["loss_box"], factor * model.box_loss(boxes, found.boxes, found.weights))


@pytest.mark.parametrize(("name", "assigner"), STRANGE)
def test_a_strange_assigner_gives_finite_losses_and_gradients(name: str, assigner: str) -> None:
    """By overlap a point may learn an object that it lies outside of; one image has no object at all."""
    model = build(f"model={name}", f"assigner@model.assigner={assigner}").train()
    batch = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    terms = model.loss(model(batch), TARGETS)
    assert all(bool(term.isfinite()) for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)


@pytest.mark.parametrize("loss", ["giou", "smooth_l1_one", "squared"])
@pytest.mark.parametrize("name", ["faster_rcnn_small", "cascade_rcnn_small", "fast_rcnn_small"])
def test_both_stages_take_losses_of_boxes_and_of_deltas(name: str, loss: str) -> None:
    stages = [f"box_loss@model.box.box_loss={loss}"]
    if name != "fast_rcnn_small":
        stages.append(f"box_loss@model.rpn.box_loss={loss}")
    model = build(f"model={name}", *stages)
    batch = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    terms = model.loss(model(batch, torch.tensor([[64, 64]] * 2), TARGETS), TARGETS)
    placed = {key: term.item() for key, term in terms.items() if "box" in key}
    assert placed and all(value > 0 for value in placed.values()), placed
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)


def test_both_stages_compare_boxes_in_pixels_where_the_loss_does() -> None:
    """A GIoU of raw deltas would be negative or of thousands; of boxes it is at most 2 per pair."""
    model = build("model=faster_rcnn_small", "box_loss@model.box.box_loss=giou", "box_loss@model.rpn.box_loss=giou")
    outputs = model(torch.rand(2, 3, 64, 64), torch.tensor([[64, 64]] * 2), TARGETS)
    samples = model.rpn.sample(outputs.rpn.lattice, TARGETS)
    anchors = outputs.rpn.lattice.boxes[samples.positive % outputs.rpn.lattice.total]
    deltas = outputs.rpn.deltas.flatten(0, 1)[samples.positive]
    drawn = len(samples.positive) + len(samples.background)
    wanted = GIoULoss()(model.rpn.coder.decode(deltas, anchors), samples.boxes) / drawn
    assert_close(model.rpn.loss(outputs.rpn, samples)["loss_rpn_box"], wanted)


def test_the_localiser_refuses_losses_of_boxes() -> None:
    assert isinstance(build("model=localiser_small", "box_loss@model.box_loss=smooth_l1_one").box_loss, SmoothL1)
    with pytest.raises(Exception, match=CIoULoss.__name__) as caught:
        build("model=localiser_small", "box_loss@model.box_loss=ciou")
    assert "shares of the image" in str(caught.value)
