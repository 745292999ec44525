from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.testing import assert_close

from detseg.models.dense import best_per_group
from detseg.models.dense_heads import conv_tower, flatten_level, one_width
from detseg.models.fcos import FCOS
from detseg.models.retinanet import RetinaNet
from detseg.nn import BackboneWithFPN, TinyBackbone
from detseg.structures import Target
from detseg.targets.anchors import AnchorGenerator


def _backbone() -> BackboneWithFPN:
    body = TinyBackbone(widths=(16, 16, 16), strides=(8, 16))
    return BackboneWithFPN(backbone=body, channels=16)


def _fcos() -> FCOS:
    return FCOS(num_classes=2, backbone=_backbone(), head_depth=1, head_groups=4).eval()


def _target(boxes: list[list[int]], crowd: list[bool]) -> Target:
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        iscrowd=torch.tensor(crowd),
    )


def test_the_best_of_every_group_stay_in_order() -> None:
    scores = torch.tensor([0.9, 0.5, 0.8, 0.04, 0.1, 0.7])
    group = torch.tensor([0, 0, 0, 0, 3, 3])
    assert best_per_group(scores, group, 2, threshold=0.05).tolist() == [0, 2, 5, 4]
    assert best_per_group(scores, group, 9, threshold=0.6).tolist() == [0, 2, 5]
    assert best_per_group(scores, group, 2, threshold=1.0).tolist() == []


def test_levels_are_flattened_by_row_column_anchor() -> None:
    level = torch.arange(2 * 6 * 2 * 2).view(2, 6, 2, 2)  # two anchors of width three
    flat = flatten_level(level, 3)
    assert flat.shape == (2, 8, 3)
    assert flat[0, 0].tolist() == [0, 4, 8] and flat[0, 1].tolist() == [12, 16, 20] and flat[0, 2].tolist() == [1, 5, 9]


def test_crowds_are_neither_objects_nor_background() -> None:
    model = _fcos()
    outputs = model(torch.rand(2, 3, 64, 64))
    plain = model.assign(outputs, [_target([[4, 4, 30, 30]], [False])] * 2)
    crowd = model.assign(outputs, [_target([[4, 4, 30, 30], [32, 32, 64, 64]], [False, True])] * 2)
    assert_close(crowd.rows, plain.rows)
    ignored = crowd.matched[0] == -2
    points = (outputs.lattice.boxes[:, :2] + outputs.lattice.boxes[:, 2:]) / 2
    assert int(ignored.sum()) > 8 and bool((points[ignored] >= 32).all())
    assert not bool((plain.matched == -2).any())


def test_ignored_references_do_not_move_the_loss() -> None:
    model = _fcos()
    targets = [_target([[4, 4, 30, 30], [32, 32, 64, 64]], [False, True])]
    outputs = model(torch.rand(1, 3, 64, 64))
    before = model.loss(outputs, targets)["loss_classification"]
    ignored = model.assign(outputs, targets).matched == -2
    outputs.logits = outputs.logits.detach() + 5.0 * ignored[..., None]
    assert_close(model.loss(outputs, targets)["loss_classification"], before.detach())


def test_images_of_a_batch_are_alike_to_images_alone() -> None:
    model = _fcos()
    torch.nn.init.normal_(model.head.classification_head.cls_logits.bias, std=0.5)
    images, sizes = torch.rand(3, 3, 64, 96), torch.tensor([[64, 96], [40, 96], [64, 33]])
    together = model.predict(model(images, sizes), sizes)
    for index in range(3):
        one = slice(index, index + 1)
        alone = model.predict(model(images[one], sizes[one]), sizes[one])[0]
        assert len(alone) > 5
        assert_close(together[index].boxes, alone.boxes, rtol=1e-4, atol=1e-3)
        assert_close(together[index].scores, alone.scores, rtol=1e-4, atol=1e-5)
        assert float(alone.boxes[:, 2].max()) <= sizes[index, 1] and float(alone.boxes[:, 3].max()) <= sizes[index, 0]


def test_the_batch_loss_is_divided_by_all_positives_or_per_image() -> None:
    targets = [_target([[4, 4, 40, 40]], [False]), _target([[4, 4, 20, 20], [30, 30, 50, 60]], [False, False])]
    for per_image in (True, False):
        model = RetinaNet(num_classes=2, backbone=_backbone(), head_depth=1, per_image=per_image)
        assignment = model.assign(model(torch.rand(2, 3, 64, 64)), targets)
        count = torch.bincount(assignment.rows // assignment.matched.shape[1], minlength=2)
        assert int(count.min()) > 0 and count[0] != count[1]
        assert_close(assignment.scale, 1 / (2 * count) if per_image else (1 / count.sum()).expand(2))


def test_heads_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"\[16, 32\] channels"):
        one_width(TinyBackbone(widths=(16, 16, 32), strides=(8, 16)))
    with pytest.raises(ValueError, match=r"20 channels cannot be parted into 8 groups"):
        conv_tower(20, 1, groups=8, nested=True)
    with pytest.raises(ValueError, match=r"\[3\] references per cell"):
        anchors = AnchorGenerator(sizes=[[32]], ratios=[[0.5, 1.0, 2.0]])
        RetinaNet(num_classes=2, backbone=_backbone(), anchors=anchors)


def test_a_map_of_any_type_is_scored_in_single_precision() -> None:
    model = _fcos().to(torch.bfloat16)
    outputs = model(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert outputs.logits.dtype == torch.bfloat16
    terms = model.loss(outputs, [_target([[4, 4, 30, 30]], [False])])
    assert {term.dtype for term in terms.values()} == {torch.float32}
    found = model.predict(outputs, torch.tensor([[64, 64]]))[0]
    assert found.scores.dtype == torch.float32 and found.boxes.dtype == torch.float32


def test_forward_exports_with_any_batch_size_and_leaves_the_model_as_it_was() -> None:
    class Heads(nn.Module):
        def __init__(self, model: FCOS) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            outputs = self.model(images)
            return outputs.logits, outputs.regression, outputs.quality

    model, images = _fcos(), torch.rand(3, 3, 64, 64)
    exported = torch.export.export(
        Heads(model), (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    outputs = model(images)
    for found, wanted in zip(exported(images), Heads(model)(images), strict=True):
        assert_close(found, wanted)
    assert outputs.lattice.boxes.tolist()[0] == [-4.0, -4.0, 4.0, 4.0]  # numbers, not an export's stand-ins
    assert len(model.predict(outputs, torch.tensor([[64, 64]] * 3))) == 3


def _step(rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the head for some of two images, of which one has an object and one has three."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = _fcos(), torch.rand(2, 3, 64, 64)
    corners = [[[4, 4, 30, 30]], [[0, 0, 20, 20], [30, 30, 60, 60], [34, 2, 60, 28]]]
    targets = [_target(boxes, [False] * len(boxes)) for boxes in corners]
    outputs = model(images[rows])
    loss = torch.stack(list(model.loss(outputs, [targets[row] for row in rows]).values())).sum()
    loss.backward()
    with torch.no_grad():  # ranks may validate unequally often: no rank waits for another here
        if rows == [0]:
            model.loss(outputs, [targets[0]])
    gradient = model.head.regression_head.bbox_reg.weight.grad
    assert gradient is not None
    return loss.detach(), gradient


def _worker(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(_step([rank]), f"{results}{rank}")
    distributed.destroy_process_group()


def test_ranks_divide_by_all_positives_so_that_two_are_like_one(tmp_path: Path) -> None:
    arguments = str(tmp_path / "store"), str(tmp_path / "rank")
    multiprocessing.start_processes(_worker, arguments, nprocs=2, start_method="fork")  # spawn imports torch anew
    (first, own), (second, other) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    loss, gradient = _step([0, 1])
    assert float(gradient.abs().max()) > 1e-4
    assert_close((first + second) / 2, loss, rtol=1e-5, atol=0)
    assert_close((own + other) / 2, gradient, rtol=1e-4, atol=1e-7)  # DDP averages so
