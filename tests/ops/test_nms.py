import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import batched_nms

from detseg.ops.nms import BatchedNMS

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])


def test_by_hand_and_sorted_by_score() -> None:
    nms = BatchedNMS(threshold=0.5)
    scores = torch.tensor([0.5, 0.6, 0.9])
    assert nms(BOXES, scores, torch.zeros(3, dtype=torch.int64)).tolist() == [2, 1]
    assert nms(BOXES, scores, torch.tensor([0, 1, 0])).tolist() == [2, 1, 0]


@pytest.mark.parametrize("count", [200, 3000])
def test_equals_torchvision(count: int) -> None:
    corner = torch.rand(count, 2) * 300
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * 60 + 1], dim=1)
    scores, labels = torch.rand(count), torch.randint(0, 5, (count,))
    keep = BatchedNMS(threshold=0.4)(boxes, scores, labels)
    assert 0 < len(keep) < count
    assert_close(keep, batched_nms(boxes, scores, labels, 0.4))


def test_half_precision_keeps_labels_apart() -> None:
    # Offsets of 1333 px a label pass what float16 holds.
    boxes = torch.tensor([[0.0, 0, 1333, 800], [0, 0, 1333, 800]]).half()
    keep = BatchedNMS(threshold=0.5)(boxes, torch.tensor([0.9, 0.8]).half(), torch.tensor([0, 70]))
    assert keep.tolist() == [0, 1]


def test_empty_input() -> None:
    empty = BatchedNMS(threshold=0.5)(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,) and empty.dtype == torch.int64


def test_threshold_outside_its_range() -> None:
    with pytest.raises(ValueError, match="threshold is 50"):
        BatchedNMS(threshold=50)
