from typing import Any

import pytest
import torch

from detseg.structures import Batch, SemanticMap, Target


def parts() -> dict[str, Any]:
    target = Target(
        boxes=torch.zeros(1, 4), labels=torch.tensor([0]), semantic=SemanticMap(torch.zeros(3, 4, dtype=torch.int64))
    )
    return {
        "images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "sizes": torch.tensor([[8, 6], [3, 4]]),
        "targets": [target, target],
    }


def test_moves_reach_every_tensor_however_deep() -> None:
    batch = Batch(**parts(), truths=parts()["targets"], proposals=[torch.zeros(3, 4), torch.zeros(0, 4)])
    moved = batch.to("meta")
    assert moved.images.is_meta and moved.sizes.is_meta
    assert moved.targets[1].boxes.is_meta and moved.targets[1].iscrowd.is_meta
    assert moved.proposals is not None and [len(boxes) for boxes in moved.proposals if boxes.is_meta] == [3, 0]
    assert moved.truths is not None and moved.truths[0].semantic is not None
    assert moved.truths[0].semantic.labels.is_meta
    assert not batch.images.is_meta and len(batch) == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", torch.zeros(2, 1, 8, 8), r"\(B, 3, H, W\)"),
        ("targets", [], "2 images but 0 targets"),
        ("truths", [], "2 images but 0 truths"),
        ("proposals", [torch.zeros(3, 4)], "2 images but 1 proposals"),
        ("proposals", [torch.zeros(3, 4), torch.zeros(2, 5)], r"proposals of image 1: boxes must be \(N, 4\)"),
        ("sizes", torch.tensor([[8, 6]]), r"\(2, 2\)"),
        ("sizes", torch.tensor([[8, 9], [3, 4]]), r"exceed the images' \(8, 8\)"),
    ],
)
def test_each_fault_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(**(parts() | {field: value}))
