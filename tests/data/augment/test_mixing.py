from __future__ import annotations

import pytest
import torch

from detseg.data.augment.mixing import mix
from detseg.structures import SemanticMap, Target


def scene(label: int, value: int) -> tuple[torch.Tensor, Target]:
    target = Target(
        boxes=torch.tensor([[1.0, 1, 3, 4]]), labels=torch.tensor([label]), image_id=label, size=(5, 6),
        masks=torch.ones((1, 5, 6), dtype=torch.bool),
    )  # fmt: skip
    return torch.full((3, 5, 6), value, dtype=torch.uint8), target


def test_pixels_are_shared_and_the_objects_of_both_count() -> None:
    first, second = scene(2, 200), scene(5, 40)
    image, target = mix(first, second, 0.25)
    assert image.dtype == torch.uint8 and bool((image == 80).all())  # 0.25 * 200 + 0.75 * 40
    assert target.labels.tolist() == [2, 5] and target.image_id == 2 and target.masks is not None
    assert bool((first[0] == 200).all()) and bool((second[0] == 40).all())
    empty = (second[0], second[1][:0])
    assert mix(first, empty, 0.5)[1].labels.tolist() == [2] and mix(empty, first, 0.5)[1].labels.tolist() == [2]


def test_a_map_of_classes_is_refused() -> None:
    image, target = scene(2, 0)
    target.semantic = SemanticMap(torch.zeros((5, 6), dtype=torch.int64))
    with pytest.raises(ValueError, match="mixup: image 2 has a map of classes"):
        mix((image, target), scene(5, 0), 0.5)
