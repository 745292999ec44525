from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from detseg.losses import heatmap_focal_loss
from detseg.models.centernet import CenterNet
from detseg.models.heatmap import HeatmapOutputs
from detseg.nn import TinyBackbone
from detseg.nn.hourglass import StackedHourglass
from detseg.ops.nms import BatchedNMS
from detseg.structures import Target
from heatmap_oracle import ideal_logits, in_order, scattered, sure, target, write_cells

STRIDE = 4


def _model(classes: int = 3, **options: object) -> CenterNet:
    backbone = TinyBackbone(widths=(8,), stem=8)
    return CenterNet(num_classes=classes, backbone=backbone, head_width=8, **options)


def _blank(size: tuple[int, int], batch: int, classes: int = 3) -> HeatmapOutputs:
    shape = -(-size[0] // STRIDE), -(-size[1] // STRIDE)
    maps = {name: torch.zeros(batch, count, *shape) for name, count in (("heat", classes), ("offset", 2), ("size", 2))}
    return HeatmapOutputs([maps], STRIDE, size)


def _ideal(model: CenterNet, targets: list[Target], size: tuple[int, int]) -> HeatmapOutputs:
    """Return outputs that say the truth where it is asked for, and nonsense elsewhere."""
    outputs = _blank(size, len(targets), model.num_classes)
    truth = model.truth(outputs, targets)
    shape = (len(targets), 2, *truth.heat.shape[2:])
    outputs.stacks[0] = {
        "heat": ideal_logits(truth.heat),
        "offset": write_cells(shape, truth.image, truth.cells, truth.offsets),
        "size": write_cells(shape, truth.image, truth.cells, truth.sizes),
    }
    return outputs


@pytest.mark.parametrize("size", [(128, 128), (126, 93)])
def test_planted_objects_are_recovered_from_ideal_maps(size: tuple[int, int]) -> None:
    model, sizes = _model(), torch.tensor([size] * 3)
    targets = [scattered(20, size, 3, 1), target([], []), scattered(7, size, 3, 2)]
    outputs = _ideal(model, targets, size)
    for found, wanted in zip(model.predict(outputs, sizes), targets, strict=True):
        assert len(sure(found)) == len(wanted)
        assert_close(in_order(sure(found).boxes, sure(found).labels), in_order(wanted.boxes, wanted.labels))
    terms = model.loss(outputs, targets)
    assert_close(terms["loss_offset"].item(), 0.0, atol=1e-5, rtol=0)
    assert_close(terms["loss_size"].item(), 0.0, atol=1e-4, rtol=0)


def test_objects_smaller_than_a_cell_and_at_the_border_are_recovered() -> None:
    model = _model()
    wanted = target([[9.2, 9.3, 9.7, 10.1], [0, 0, 0.5, 0.5], [126, 60, 128, 64], [60, 120, 64, 128]], [0, 1, 2, 0])
    found = sure(model.predict(_ideal(model, [wanted], (128, 128)), torch.tensor([[128, 128]]))[0])
    assert_close(in_order(found.boxes, found.labels), in_order(wanted.boxes, wanted.labels), rtol=1e-5, atol=1e-4)


def test_the_smallest_of_a_shared_centre_says_the_size_and_each_class_keeps_its_peak() -> None:
    model = _model()
    large, small = [4.0, 4, 36, 36], [16.0, 17, 24, 23]
    for labels in ([0, 0], [0, 1]):
        wanted = target([large, small], labels)
        outputs = _ideal(model, [wanted], (64, 64))
        found = sure(model.predict(outputs, torch.tensor([[64, 64]]))[0])
        assert found.labels.sort().values.tolist() == sorted(set(labels))
        assert_close(found.boxes, torch.tensor([small] * len(found)))
        assert float(model.diagnostics(outputs, [wanted])["shared_centres"]) == 0.5
        assert float(model.diagnostics(outputs, [wanted])["centre_score"]) > 0.99


def test_the_loss_is_equation_4_by_hand() -> None:
    model = _model(classes=1)
    outputs = _blank((32, 32), 2, 1)
    outputs.stacks[0]["size"] += 1.0
    # Two objects in the batch; sizes of 8 x 12 and 4 x 4 pixels where all say 4, offsets (0.5, 0.25) and (0, 0).
    targets = [target([[2, 3, 10, 15]], [0]), target([[14, 14, 18, 18]], [0])]
    terms = model.loss(outputs, targets)
    assert_close(terms["loss_size"].item(), 0.1 * (4 + 8 + 0) / 2)
    assert_close(terms["loss_offset"].item(), (0.5 + 0.25 + 0.0) / 2)
    truth = model.truth(outputs, targets)
    assert truth.cells.tolist() == [[1, 2], [4, 4]] and truth.heat[0, 0, 2, 1] == 1
    assert_close(terms["loss_heatmap"], heatmap_focal_loss(torch.zeros(2, 1, 8, 8), truth.heat) / 2)


def test_crowds_teach_nothing() -> None:
    model = _model()
    crowd = target([[4, 4, 20, 20], [32, 32, 64, 64]], [0, 1], [False, True])
    outputs = _blank((64, 64), 1)
    before = model.loss(outputs, [crowd])
    outputs.stacks[0]["heat"][:, :, 8:, 8:] = 9.0
    assert_close(model.loss(outputs, [crowd]), before)
    alone = _model().loss(_blank((64, 64), 1), [target([[4, 4, 20, 20]], [0])])
    assert float(alone["loss_heatmap"]) > float(before["loss_heatmap"])
    assert_close(alone["loss_size"], before["loss_size"])


def test_a_batch_without_objects_touches_every_head_and_costs_no_box() -> None:
    model = _model()
    terms = model.loss(model(torch.rand(2, 3, 32, 48)), [target([], []), target([], [])])
    torch.stack(list(terms.values())).sum().backward()
    assert terms["loss_offset"].item() == terms["loss_size"].item() == 0 and terms["loss_heatmap"].item() > 0
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    figures = model.diagnostics(model(torch.rand(1, 3, 32, 32)), [target([], [])])
    assert [float(value) for value in figures.values()] == [0.0, 0.0]


def test_many_objects_and_a_single_class() -> None:
    model = _model(classes=1).eval()
    corner = torch.rand(2000, 2) * 110
    boxes = torch.cat([corner, corner + 1 + torch.rand(2000, 2) * 17], dim=1)
    outputs = model(torch.rand(1, 3, 128, 128))
    terms = model.loss(outputs, [Target(boxes=boxes, labels=torch.zeros(2000, dtype=torch.int64))])
    assert all(bool(term.isfinite()) for term in terms.values())
    found = model.predict(outputs, torch.tensor([[128, 128]]))[0]
    assert len(found) == 100 and bool((found.labels == 0).all())


def test_every_map_of_a_stack_is_supervised_and_the_last_is_read() -> None:
    backbone = StackedHourglass(widths=(8, 12), depths=(1, 1), stacks=2, stem=8, out_channels=8)
    model = CenterNet(num_classes=2, backbone=backbone, head_width=8).eval()
    outputs = model(torch.rand(1, 3, 32, 32))
    targets = [target([[4, 4, 20, 20]], [1])]
    parts = [model.loss(HeatmapOutputs([maps], 4, (32, 32)), targets) for maps in outputs.stacks]
    assert len(parts) == 2
    for name, term in model.loss(outputs, targets).items():
        assert_close(term, (parts[0][name] + parts[1][name]) / 2)
    sizes = torch.tensor([[32, 32]])
    last = model.predict(HeatmapOutputs(outputs.stacks[1:], 4, (32, 32)), sizes)[0]
    assert_close(model.predict(outputs, sizes)[0].boxes, last.boxes)


def test_peaks_in_the_padding_are_not_read_and_nms_is_an_option() -> None:
    outputs = _blank((32, 32), 1, 1)
    heat, sizes = outputs.stacks[0]["heat"], outputs.stacks[0]["size"]
    heat -= 9.0
    heat[0, 0, 2, 2], heat[0, 0, 2, 4], heat[0, 0, 7, 7] = 3.0, 2.0, 5.0
    sizes[:] = 5.0
    valid = torch.tensor([[20, 24]])
    free = sure(_model(classes=1).predict(outputs, valid)[0], 0.5)
    assert_close(free.boxes, torch.tensor([[0.0, 0, 18, 18], [6, 0, 24, 18]]))
    assert_close(free.scores, torch.tensor([3.0, 2.0]).sigmoid())
    thinned = sure(_model(classes=1, nms=BatchedNMS(threshold=0.4)).predict(outputs, valid)[0], 0.5)
    assert_close(thinned.boxes, free.boxes[:1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \[4, 8\]"):
        CenterNet(num_classes=2, backbone=TinyBackbone(widths=(8, 8), stem=8))
    with pytest.raises(ValueError, match=r"CenterNet, peak_kernel: kernel is 2"):
        _model(peak_kernel=2)
