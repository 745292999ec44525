import pytest
import torch

from detseg.structures import IGNORE_INDEX, PanopticMap, SemanticMap


def test_resizing_takes_the_nearest_label_and_makes_none_up() -> None:
    labels = torch.tensor([[0, 4], [IGNORE_INDEX, 2]])
    grown = SemanticMap(labels).resize((4, 6))
    torch.testing.assert_close(grown.labels, labels.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert grown.resize((4, 6)) is grown
    torch.testing.assert_close(grown.resize((2, 2)).labels, labels)


def test_semantic_faults() -> None:
    with pytest.raises(ValueError, match=r"\(H, W\) int64"):
        SemanticMap(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="label -3 is below 0; unlabelled is 255"):
        SemanticMap(torch.full((2, 2), -3))


def test_panoptic_faults() -> None:
    segments = torch.tensor([[0, 1], [2, 2]])
    whole = PanopticMap(segments, labels=torch.tensor([3, 0]), is_thing=torch.tensor([True, False]))
    assert whole.labels[whole.segments[1, 0] - 1] == 0
    with pytest.raises(ValueError, match="names segment 2 of 1"):
        PanopticMap(segments, labels=torch.tensor([3]), is_thing=torch.tensor([True]))
    with pytest.raises(ValueError, match="must both be"):
        PanopticMap(segments, labels=torch.tensor([3, 0]), is_thing=torch.tensor([True]))
