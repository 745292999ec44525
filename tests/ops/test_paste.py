import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detseg.ops import paste
from detseg.ops.paste import paste_masks

SIZE = (60, 90)


def scene(count: int) -> tuple[Tensor, Tensor]:
    """Masks and boxes that touch the image (torchvision fails on others), some over the border, some very thin."""
    corner = torch.rand(count, 2) * torch.tensor([90.0, 60.0])
    side = torch.rand(count, 2) ** 2 * 70
    return torch.rand(count, 28, 28), torch.cat([corner, corner + side], dim=1)


def both_paths(masks: Tensor, boxes: Tensor) -> list[Tensor]:
    """The way of the CPU, and that of the GPU run on the CPU."""
    cells = torch.nn.functional.pad(masks, (1, 1, 1, 1))
    frames = paste._frames(boxes, 30 / 28)
    return [paste_masks(masks, boxes, SIZE), paste._paste_together(cells, frames, SIZE) > 0.5]


def test_both_ways_equal_torchvision() -> None:
    masks, boxes = scene(80)
    soft = paste_masks_in_image(masks[:, None], boxes, SIZE)[:, 0]
    sure = (soft - 0.5).abs() > 1e-4
    assert 0.02 < (soft > 0.5).float().mean() < 0.5
    for pasted in both_paths(masks, boxes):
        assert pasted.shape == (80, *SIZE) and pasted.dtype == torch.bool
        assert_close(pasted[sure], (soft > 0.5)[sure])


def test_mixed_precision_moves_no_edge() -> None:
    masks, boxes = scene(30)
    _, expected = both_paths(masks, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        _, pasted = both_paths(masks, boxes)
    assert int(expected.sum()) > 0 and torch.equal(pasted, expected)


def test_full_mask_fills_its_box() -> None:
    for pasted in both_paths(torch.ones(1, 28, 28), torch.tensor([[10.0, 20.0, 38.0, 48.0]])):
        expected = torch.zeros(SIZE, dtype=torch.bool)
        expected[20:48, 10:38] = True
        # the frame is cut to whole pixels, so its edge may be one pixel off, as torchvision's is
        assert (pasted[0] != expected).sum() <= 2 * 28 + 1


@pytest.mark.parametrize(
    "box", [[-500.0, -500, -400, -400], [200, 200, 300, 300], [5, 5, 5, 5], [-1000, -1000, 1000, 1000]]
)
def test_boxes_outside_or_without_area(box: list[float]) -> None:
    cpu, gpu = both_paths(torch.ones(1, 28, 28), torch.tensor([box]))
    assert_close(cpu, gpu)
    assert cpu.all() == (box[2] == 1000)


def test_threshold_is_exclusive() -> None:
    half = torch.full((1, 28, 28), 0.5)
    box = torch.tensor([[10.0, 10, 40, 40]])
    assert not paste_masks(half, box, SIZE, threshold=0.5).any()
    assert paste_masks(half, box, SIZE, threshold=0.49).any()


def test_no_masks() -> None:
    for pasted in both_paths(torch.zeros(0, 28, 28), torch.zeros(0, 4)):
        assert pasted.shape == (0, *SIZE)


@pytest.mark.gpu
def test_chunks_on_a_gpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, boxes = scene(30)
    on_cpu = paste_masks(masks, boxes, SIZE)
    monkeypatch.setattr(paste, "_CHUNK", 4 * SIZE[0] * SIZE[1])
    on_gpu = paste_masks(masks.cuda(), boxes.cuda(), SIZE).cpu()
    assert (on_cpu != on_gpu).float().mean() < 1e-4
