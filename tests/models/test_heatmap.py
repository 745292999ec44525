from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.testing import assert_close

from detseg.models.centernet import CenterNet
from detseg.models.cornernet import CornerNet
from detseg.models.heatmap import HeatmapDetector, blank_padding, prediction, read_cells
from detseg.nn import TinyBackbone
from heatmap_oracle import target

KINDS = ["centre", "corner"]


def _model(kind: str) -> HeatmapDetector:
    torch.manual_seed(0)
    backbone = TinyBackbone(widths=(8,), stem=8)
    if kind == "centre":
        return CenterNet(num_classes=2, backbone=backbone, head_width=8).eval()
    return CornerNet(num_classes=2, backbone=backbone, pool_width=8).eval()


def test_cells_beyond_the_border_are_blank_and_the_one_that_begins_there_is_not() -> None:
    heat = blank_padding(torch.zeros(2, 1, 4, 4), torch.tensor([[16, 16], [8, 11]]), 4)
    assert bool((heat[0] == 0).all())
    wanted = torch.full((4, 4), -torch.inf)
    wanted[:3, :3] = 0.0
    assert_close(heat[1, 0], wanted)


def test_cells_are_read_with_indices_that_broadcast() -> None:
    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    found = read_cells(maps, torch.tensor([[0], [1]]), torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 0], [1, 2]]))
    assert found.shape == (2, 2, 3) and found.dtype == torch.float32
    assert found[0, 1].tolist() == maps[0, :, 2, 0].tolist() and found[1, 0].tolist() == maps[1, :, 3, 1].tolist()


def test_a_prediction_starts_at_its_prior() -> None:
    layers = prediction(4, 8, 3, prior=0.1)
    nn.init.zeros_(layers[2].weight)
    assert_close(layers(torch.rand(1, 4, 5, 5)).sigmoid(), torch.full((1, 3, 5, 5), 0.1))


def test_the_best_above_the_threshold_stay_and_are_cut_to_the_image() -> None:
    model = _model("centre")
    model.score_threshold, model.max_detections = 0.3, 2
    boxes = torch.tensor([[[-3.0, 2, 50, 9], [1, 1, 2, 2], [0, 0, 9, 9], [0, 0, 8, 8]]])
    labels = torch.tensor([[1, 0, 1, 0]])
    (found,) = model.select(boxes, torch.tensor([[0.9, 0.5, 0.4, 0.3]]), labels, torch.tensor([[8, 20]]))
    assert_close(found.boxes, torch.tensor([[0.0, 2, 20, 8], [1, 1, 2, 2]]))
    assert found.labels.tolist() == [1, 0]
    assert_close(found.scores, torch.tensor([0.9, 0.5]))
    (none,) = model.select(boxes, torch.full((1, 4), 0.2), labels, torch.tensor([[8, 20]]))
    assert len(none) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_are_alike_to_images_alone(kind: str) -> None:
    model = _model(kind)
    images, sizes = torch.rand(2, 3, 32, 48), torch.tensor([[32, 48], [21, 33]])
    together = model.predict(model(images, sizes), sizes)
    for index in range(2):
        one = slice(index, index + 1)
        alone = model.predict(model(images[one], sizes[one]), sizes[one])[0]
        assert len(alone) > 5
        assert_close(together[index].scores, alone.scores)
        assert_close(together[index].boxes, alone.boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_half_precision_are_judged_in_single(kind: str) -> None:
    model = _model(kind).to(torch.bfloat16)
    outputs = model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16))
    terms = model.loss(outputs, [target([[4, 4, 20, 20], [6, 8, 30, 30]], [0, 1])])
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert all(bool(term.isfinite()) for term in terms.values())
    found = model.predict(outputs, torch.tensor([[32, 32]]))[0]
    assert found.scores.dtype == torch.float32 and found.boxes.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_forward_exports_with_any_batch_size(kind: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model(kind)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return self.model(images).stacks[-1]

    heads, images = Heads(), torch.rand(3, 3, 32, 32)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(heads, (images[:2],), dynamic_shapes=dynamic).module()
    assert_close(exported(images), heads(images))


def _step(kind: str, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of a head for some of two images, of which one has an object and one has three."""
    torch.set_num_threads(1)
    model = _model(kind)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    targets = [target([[4, 4, 30, 30]], [0]), target([[0, 0, 20, 20], [15, 15, 30, 30], [17, 1, 30, 14]], [1, 0, 1])]
    terms = model.loss(model(images[rows]), [targets[row] for row in rows])
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    gradients = [value.grad.flatten() for value in model.heads.parameters() if value.grad is not None]
    return loss.detach(), torch.cat(gradients)


def _worker(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save([_step(kind, [rank]) for kind in KINDS], f"{results}{rank}")
    distributed.destroy_process_group()


def test_two_ranks_are_like_one_with_the_whole_batch(tmp_path: Path) -> None:
    arguments = str(tmp_path / "store"), str(tmp_path / "rank")
    multiprocessing.start_processes(_worker, arguments, nprocs=2, start_method="fork")  # spawn imports torch anew
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for kind, (first, own), (second, other) in zip(KINDS, *ranks, strict=True):
        loss, gradient = _step(kind, [0, 1])
        assert float(gradient.abs().max()) > 1e-4
        assert_close((first + second) / 2, loss, rtol=1e-5, atol=0)
        assert_close((own + other) / 2, gradient, rtol=1e-4, atol=1e-6)  # DDP averages so
