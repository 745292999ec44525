from __future__ import annotations

import pytest
import torch

from detseg.data.augment.mosaic import mosaic, quarters
from detseg.structures import SemanticMap, Target


@pytest.mark.parametrize(("canvas", "centre"), [((30, 40), (0.5, 0.25)), ((2, 2), (0.9, 0.01)), ((7, 100), (0.3, 0.7))])
def test_quarters_cover_the_canvas_once_and_meet_in_the_middle(
    canvas: tuple[int, int], centre: tuple[float, float]
) -> None:
    seen = torch.zeros(canvas, dtype=torch.int64)
    parts = quarters(canvas, centre)
    for (top, left), (height, width), _ in parts:
        assert height >= 1 and width >= 1
        seen[top : top + height, left : left + width] += 1
    assert bool((seen == 1).all())
    middle = (parts[0].size[0], parts[0].size[1])
    for (top, left), (height, width), (down, right) in parts:  # a smaller image touches the middle
        assert (top + down * height, left + right * width) == middle


def test_four_images_as_one() -> None:
    parts = quarters((4, 6), (0.25, 0.5))
    assert [part.size for part in parts] == [(1, 3), (1, 3), (3, 3), (3, 3)]
    scenes = []
    for number, part in enumerate(parts):
        target = Target(
            boxes=torch.tensor([[0.0, 0, 2, 1]]), labels=torch.tensor([number]), image_id=10 + number, size=part.size,
            semantic=SemanticMap(torch.full(part.size, number)),
        )  # fmt: skip
        scenes.append((torch.full((3, *part.size), 50 * number, dtype=torch.uint8), target))
    image, target = mosaic(scenes, parts, (4, 6))
    assert image[0].tolist() == [[0] * 3 + [50] * 3] + [[100] * 3 + [150] * 3] * 3
    assert target.boxes.tolist() == [[0, 0, 2, 1], [3, 0, 5, 1], [0, 1, 2, 2], [3, 1, 5, 2]]
    assert target.labels.tolist() == [0, 1, 2, 3] and target.image_id == 10 and target.size == (4, 6)
    assert target.semantic is not None
    assert (target.semantic.labels * 50).tolist() == image[0].tolist()
